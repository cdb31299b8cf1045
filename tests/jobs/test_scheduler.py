"""Which scheduler a login node has."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Sequence
from importlib import resources
from typing import Any, cast

import pytest

from bokeh_ssh import Batch, SubmitError
from bokeh_ssh._jobs import grid_engine, lsf, pbs, scheduler
from bokeh_ssh._jobs.warden import Answer, Warden

_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


class LoginNode:
    """What has these programs, of which some answer."""

    def __init__(self, found: list[str], answers: str = "") -> None:
        self.found = found
        self._answers = answers

    def run(self, words: Sequence[str], **more: Any) -> Answer:
        """Run one of them."""
        return Answer(0 if words[0] == self._answers else 1, "", "")


@pytest.mark.parametrize(
    ("found", "answers", "name"),
    [
        (["qconf"], "", "sge"),
        (["sbatch"], "", "slurm"),
        (["bqueues"], "", "lsf"),
        (["qmgr"], "", "pbs"),
        (["sbatch", "qmgr"], "qstat", "pbs"),
        (["sbatch", "qconf", "bqueues"], "sinfo", "slurm"),
        (["sbatch", "qmgr"], "nothing", "slurm"),
    ],
)
def test_scheduler_is_the_one_that_answers(found: list[str], answers: str, name: str) -> None:
    """Several have a qsub, and a bsub may be Slurm's: programs that one alone has tell them apart.

    Where several are there, such as the remains of an older one, the first that answers is taken.
    """
    there = cast(Warden, LoginNode(found, answers))
    assert name == scheduler.choose(there, "there").NAME


def test_machine_without_a_scheduler_is_told() -> None:
    """It is an error that lists what was looked for; a name looks for one alone."""
    with pytest.raises(SubmitError, match="Slurm's sbatch, Grid Engine's qconf, LSF's bqueues, PBS's qmgr"):
        scheduler.choose(cast(Warden, LoginNode([])), "there")
    assert scheduler.programs("pbs") == ["qmgr"]
    assert len(scheduler.programs()) == 4


@pytest.mark.parametrize("module", ["cluster_job", "job_list", "job_news", "job_stream", "script", "warden"])
def test_what_is_said_of_all_schedulers_names_no_ones_command(module: str) -> None:
    """Each scheduler has its own words for what only one of them has, such as its commands."""
    commands = re.compile(r"\b(sbatch|squeue|scancel|q(stat|del|sub|mgr|conf)|b(jobs|kill|sub|queues))\b")
    text = resources.files("bokeh_ssh").joinpath("_jobs", f"{module}.py").read_text("utf-8")
    tree = ast.parse(text)
    docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)}
    words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert not [
        word for word in words if isinstance(word, str) and commands.search(word) and word not in docs
    ]
    assert all(("squeue" in each.OF_ARRAY) == (each is scheduler.slurm) for each in scheduler.KNOWN)


@pytest.mark.parametrize("which", [grid_engine, lsf, pbs], ids=lambda which: which.NAME)
def test_scripts_are_for_any_shell(which: scheduler.Scheduler) -> None:
    """The few lines of shell are such, and pass on that there is no scheduler."""
    scripts = [which.ASK, which.LIST, which.cancel_words("7"), which.owner_words("7")]
    scripts.append(which.submit_words(Batch(), "f00", "/dev/null"))
    for words in scripts:
        if words[0] != "sh":
            continue
        done = subprocess.run([words[0], "-n", *words[1:]], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        nowhere = {"PATH": "/nowhere"}
        done = subprocess.run(words, capture_output=True, env=nowhere, executable="/bin/sh", check=False)
        assert done.returncode, words
