"""What a person has answered, for logging in again without asking again."""

from __future__ import annotations

from collections.abc import Callable

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.events import Prompt, Question

_Key = tuple[str, str, str]


def ask_person(prompt: Prompt, question: Question) -> str | None:
    """Ask, and see to it that the answer is one.

    :raises UsageError: if it is neither a text nor None
    """
    answer: object = prompt(question)
    if answer is not None and not isinstance(answer, str):
        msg = f"the prompt answered with a {type(answer).__name__}"  # which may hold a secret
        raise UsageError(msg, host=question.host, hint="have it give a text, or None to decline")
    return answer


class PromptCache:
    """Passwords and passphrases that worked, as long as one tunnel lives; codes work once, and are not kept.

    In this process's memory only, as ``ssh`` keeps a connection for others (ControlMaster) and an agent keys.

    :param before: called before a person is asked
    """

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self._before = before
        self._kept: dict[_Key, str] = {}
        self._new: dict[_Key, str] = {}
        self._given: set[_Key] = set()

    def __repr__(self) -> str:
        return f"<PromptCache of {len(self._kept)} answers>"

    def begin(self, prompt: Prompt) -> Prompt:
        """Begin a login; return what asks ``prompt`` only for what is not known.

        What is asked twice in one login was answered wrongly the first time.
        """
        self._new = {}
        self._given = set()

        def ask(question: Question) -> str | None:
            key = (question.kind, question.host, question.text)
            if question.reusable and key not in self._given and key in self._kept:
                self._given.add(key)
                return self._kept[key]
            self._kept.pop(key, None)
            self._before()
            answer = ask_person(prompt, question)
            if question.reusable and answer is not None:
                self._new[key] = answer
            return answer

        return ask

    def keep(self) -> None:
        """Keep what was answered since: the login has worked."""
        self._kept |= self._new
