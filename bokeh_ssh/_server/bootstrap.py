"""How a server is started on a machine of which only the login is known: the text sent there, step by step.

The way there has four steps, so that each does only what it alone can do:

1. The user's login shell, whichever it is, gets one constant command: it says hello and hands over to
   ``/bin/sh``. Nothing in it means anything to any shell but single quotes (``exec_line``).
2. ``/bin/sh`` reads the real script as one encoded line from standard input, runs ``setup``, goes to ``cwd``
   and finds the Python interpreters (:func:`script`).
3. Python checks itself for the package, hands over to the next interpreter if it lacks it, and reads the
   supervisor from standard input (:data:`BOOTSTRAP`).
4. The supervisor reads what to start as JSON (``Launch.spec``): words that no shell has seen.

So what the caller gave travels over standard input alone, and ``ps`` shows no secret before the server's own
command line. Standard input is only written once the hello has come, so that a start file cannot eat it.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence

from bokeh_ssh._server.launch_spec import OLDEST_BOKEH, OLDEST_PYTHON, Launch, not_an_option
from bokeh_ssh._ssh.remote_shell import READ, encode

#: The name of a command or a function, and what may stand before one.
_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
_RESERVED = frozenset({"if", "then", "elif", "else", "while", "until", "do", "!", "time"})

#: Where PYTHONPATH is while a Python of ours starts.
KEPT = "BOKEH_SSH_PYTHONPATH"

#: Those of ``env`` that decide which Python is found and what it can import: the script needs them as well.
_EARLY = ("PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONNOUSERSITE", "LD_LIBRARY_PATH")


def word(path: str) -> str:
    """Quote a path for the shell, but leave the ``~/`` or ``~user/`` that it starts with to it."""
    home = re.match(r"~[\w.-]*(/|$)", path, re.ASCII)
    if not home:
        return shlex.quote(not_an_option(path))
    return home.group() + (shlex.quote(path[home.end() :]) if path[home.end() :] else "")


def control_client_script(
    pythons: Sequence[str],
    env: Mapping[str, str],
    mark: str,
    program: bytes,
    order: bytes,
    libraries: str = "",
    setup: str | Sequence[str] = (),
) -> bytes:
    """Return all that is to be written once the hello has come, for a program that needs no package.

    :param pythons: interpreters; the first that runs is taken
    :param env: variables; those that Python needs early are set
    :param order: a line of JSON
    :param libraries: the LD_LIBRARY_PATH of the first interpreter, which a module may have set
    :param setup: steps that may bring a Python; they are run if there is none without them
    """
    # It needs the standard library alone, which it is not to look for in any directory of the person's.
    lines = [*_early({name: value for name, value in env.items() if name != "PYTHONPATH"}), _NO_PATH]
    check = f"{_CLEAN}; import array, socket; sys.exit(sys.version_info < {OLDEST_PYTHON!r})"
    tries = []
    for number, path in enumerate(pythons):
        where = ""
        if libraries and not number:
            where = f"LD_LIBRARY_PATH={shlex.quote(libraries)}; export LD_LIBRARY_PATH; "
        begin = f"{where}exec {_START} {shlex.quote(_ALONE + _TAKE)}"
        tries += [f"p={word(path)}", f"if ({where}check); then {begin}; fi"]
    brought = take_path(setup)
    lines += [*tries, *brought, *(tries if brought else ())]
    lines.insert(0, f'check() {{ "$p" -S -c {shlex.quote(check)} </dev/null >/dev/null 2>&1; }}')
    lines.append(f"""echo '{mark}{{"event":"refused","why":"python"}}'; exit 127""")
    return encode("\n".join(lines)) + b"%d\n" % len(program) + program + order


def take_path(setup: str | Sequence[str]) -> list[str]:
    """Write what takes the path to programs from a set-up in a login shell; nothing where there is none."""
    steps = (setup,) if isinstance(setup, str) else setup
    if not any(steps):
        return []
    said = 'printf "bokeh-ssh path:%sbokeh-ssh libraries:%s" "$PATH" "${LD_LIBRARY_PATH-}" >&5'
    text = "\n".join(["exec 5>&1 >/dev/null 2>&1", *_run_setup(steps), said])
    return [f"set -- {shlex.quote(text)}", _TAKE_PATH]


#: A start file may say something before, and is not to read or write the client's stream.
_TAKE_PATH = """\
bokeh_ssh_s=sh; if command -v bash >/dev/null 2>&1; then bokeh_ssh_s=bash; fi
bokeh_ssh_p=$("$bokeh_ssh_s" -lc "$1" 3<&- 4>&- </dev/null 2>/dev/null)
case $bokeh_ssh_p in *'bokeh-ssh path:'*)
  bokeh_ssh_p=${bokeh_ssh_p#*bokeh-ssh path:}
  PATH=${bokeh_ssh_p%%bokeh-ssh libraries:*}; bokeh_ssh_p=${bokeh_ssh_p#*bokeh-ssh libraries:}
  if [ -n "$bokeh_ssh_p" ]; then LD_LIBRARY_PATH=$bokeh_ssh_p; export LD_LIBRARY_PATH; fi ;;
esac"""


def _run_setup(steps: Sequence[str], *begun: str) -> list[str]:
    """Write what runs the steps of a set-up, and ends the shell with the first that fails.

    :param begun: what reports where it is, before each
    """
    lines, known = [], " ".join(steps)
    if re.search(r"\b(conda|mamba)\b", known):
        lines.append(_CONDA)
    if re.search(r"\b(module|ml)\b", known):
        lines.append(_MODULE)
    for number, step in enumerate(steps, 1):
        at = f"bokeh_ssh_at=setup{number}"
        lines += [at, *begun, *_import_functions(step), f"eval {shlex.quote(step)}"]
        lines.append("bokeh_ssh_r=$?; case $bokeh_ssh_r in 0) ;; *) exit $bokeh_ssh_r ;; esac")
    return [*lines, _BACK_TO_SHELL] if steps else []


#: What Python runs first: it has put the current directory, which is often the home, before all others, so
#: an import before this would be one from there. ``sys`` is a part of Python itself.
_CLEAN = "import sys; sys.path[:] = [p for p in sys.path if p]"

#: Away with a path of the person's own, for programs that need none.
_NO_PATH = "unset PYTHONPATH"

#: Takes the current directory and the home out of PYTHONPATH, for a Python of ours: an empty word in it is
#: the current directory too, as in "/my/lib:". Python would follow it before it has read a word of ours. What
#: it was is kept, for what is started in turn.
APART = f"""\
unset {KEPT}
if [ -n "${{PYTHONPATH-}}" ]; then
  {KEPT}=$PYTHONPATH; export {KEPT}
  bokeh_ssh_y=; set -f; IFS=:
  for bokeh_ssh_e in $PYTHONPATH; do
    case $bokeh_ssh_e in /*)
      if [ "$bokeh_ssh_e" -ef . ] || [ "$bokeh_ssh_e" -ef "${{HOME-/}}" ]; then :
      else bokeh_ssh_y=$bokeh_ssh_y${{bokeh_ssh_y:+:}}$bokeh_ssh_e; fi ;;
    esac
  done 2>/dev/null
  unset IFS; set +f
  PYTHONPATH=$bokeh_ssh_y
fi"""

#: Runs a text as Python, without what an installation adds.
_START = '"$p" -S -c "import sys; exec(sys.argv[1])"'


def list_pythons(*first: str | None) -> list[str]:
    """List the interpreters to try: these, if they are given, and then those that a PATH may have."""
    return list(dict.fromkeys(filter(None, (*first, "python3", "python"))))


def supervisor_input(
    launch: Launch, mark: str, supervisor: bytes, token: str = "", key: str = "", *, directory: str = ""
) -> bytes:
    """Return all that is to be written once the hello has come: script, supervisor, first message.

    :param directory: where it starts, whatever start files say; empty is the home
    """
    steps = (launch.setup,) if isinstance(launch.setup, str) else launch.setup
    lines = [_ASIDE, f"bokeh_ssh_mark={mark}", _TRAP]
    if any(steps):
        first = [*lines, _LOGIN.replace("READ", shlex.quote(READ)).replace("HERE", READ)]
        text = encode("\n".join(first)) + encode(script(launch, steps, mark, directory))
    else:
        text = encode("\n".join([*lines, script(launch, (), mark, directory)]))
    return text + b"%d\n" % len(supervisor) + supervisor + launch.spec(mark, token, key)


def login_shell_line(mark: str) -> str:
    """Return a command that has the login shell of ``setup`` say hello, once its start files are over."""
    return f"exec /bin/sh -c 'exec bash -lc \"echo {mark}hello\" </dev/null'"


def script(launch: Launch, steps: tuple[str, ...], mark: str, directory: str = "") -> str:
    """Write the shell script that runs ``setup``, goes to ``cwd`` and hands over to Python."""
    lines = [f"bokeh_ssh_mark={mark}", _TRAP] if steps else []
    # A start file may have gone elsewhere, or have failures end the shell (set -e).
    place = shlex.quote(directory) if directory else ""
    lines.append(f"set +e +u; unset CDPATH; command cd {place} 2>/dev/null")
    lines += [*_run_setup(steps, _BEGUN), *_early(launch.env)]
    if launch.cwd is not None:
        lines.append(f"bokeh_ssh_at=cwd; unset CDPATH; command cd {word(launch.cwd)} || exit 1")
    lines += ["bokeh_ssh_at=python; unalias -a 2>/dev/null; set --", _BEGUN]
    for path in list_pythons() if launch.python is None else [launch.python]:
        lines.append(f"bokeh_ssh_p={word(path)}")
        lines.append(
            'bokeh_ssh_q=$(command -v "$bokeh_ssh_p") && [ -x "$bokeh_ssh_q" ] && set -- "$@" "$bokeh_ssh_q"'
        )
    lines.append('[ $# -gt 0 ] || { echo "PATH=$PATH" >&2; [ ! -e "$bokeh_ssh_p" ] || exit 126; exit 127; }')
    need = shlex.quote(launch.package)
    lines.append(APART)
    lines.append(
        "exec \"$1\" -c 'import sys; exec(sys.argv[1])' "
        f'{shlex.quote(BOOTSTRAP)} {mark} {need} 0 "$@" <&3 >&4 3<&- 4>&-'
    )
    return "\n".join(lines)


def _import_functions(step: str) -> list[str]:
    """Write what takes commands that are not found from an interactive shell, where people have them."""
    names = dict.fromkeys(
        name for name in map(_first_command, re.split(r"[;&|(){}`\n]+", step)) if _NAME.fullmatch(name)
    )
    checks = [f"command -v {name} >/dev/null 2>&1" for name in names]
    return (
        [f'if [ -n "${{BASH_VERSION-}}" ] && ! {{ {" && ".join(checks)}; }}; then', _IMPORT, "fi"]
        if checks
        else []
    )


def _first_command(part: str) -> str:
    """Return the command that a part of a shell line runs; empty where there is none."""
    words = itertools.dropwhile(lambda word: word in _RESERVED or "=" in word, part.split())
    return next(words, "")


def _early(env: Mapping[str, str]) -> list[str]:
    return [f"{name}={shlex.quote(env[name])}; export {name}" for name in _EARLY if name in env]


#: Puts both ends of the line to the client aside, so that no start file or set-up reads or writes them. One
#: may have closed standard error.
_ASIDE = "( : >&2 ) || exec 2>/dev/null; exec 3<&0 4>&1 </dev/null >&2"

#: Reports to the client where the script ended, if it does; handing over to Python is not an end.
_TRAP = (
    "bokeh_ssh_at=start; trap 'bokeh_ssh_r=$?; "
    'command printf "%s{\\"event\\":\\"failed\\",\\"at\\":\\"%s\\",\\"status\\":%d}\\n" '
    '"$bokeh_ssh_mark" "$bokeh_ssh_at" $bokeh_ssh_r >&4\' EXIT'
)

#: Reports to the client how far it has come: start files are over, and some of the steps.
_BEGUN = """command printf '%s{"event":"begun","at":"%s"}\\n' "$bokeh_ssh_mark" "$bokeh_ssh_at" >&4"""

#: Takes back what start files and set-up have made of commands that come next: people have functions and
#: aliases in the place of ``cd`` that list the directory, or fail where it has no ``.env``.
_BACK_TO_SHELL = """\
set +e +u; ( : >&2 ) || exec 2>/dev/null
unalias -a 2>/dev/null
unset -f cd command exec export printf test python python3 2>/dev/null"""

#: What ~/.bashrc defines below its guard for shells that are not interactive: functions, aliases, and the
#: variables that they need. Such a shell has nothing to read and no terminal, and is asked once. It lists
#: what is bash's own too, which is refused without a word.
_IMPORT = """\
if [ -z "${bokeh_ssh_i-}" ]; then
  bokeh_ssh_s='echo bokeh-ssh functions; declare -p; declare -f; alias -p'
  bokeh_ssh_i=$(exec 3<&- 4>&-; bash -ic "$bokeh_ssh_s" </dev/null 2>/dev/null)
  case $bokeh_ssh_i in *'bokeh-ssh functions'*)
    shopt -s expand_aliases; eval "${bokeh_ssh_i#*bokeh-ssh functions}" 2>/dev/null
    command cd . ;;  # $PWD may be where a start file went
  esac
  bokeh_ssh_i=done
fi"""

#: `setup` is written for a login shell; people write it in bash. The next line of input is for that one.
_LOGIN = """\
bokeh_ssh_at=login
if command -v bash >/dev/null 2>&1; then exec bash -lc READ; fi
[ -r /etc/profile ] && . /etc/profile
[ -r "$HOME/.profile" ] && . "$HOME/.profile"
HERE"""

#: `conda activate` is a shell function, which "conda init" puts into files for interactive shells only.
_CONDA = """\
case $(command -v conda) in conda) ;; *)
  bokeh_ssh_p=$(command -v conda)
  for bokeh_ssh_d in "${CONDA_EXE%/*/conda}" "${bokeh_ssh_p%/*/conda}" "$HOME"/miniforge3 \\
    "$HOME"/mambaforge "$HOME"/miniconda3 "$HOME"/anaconda3 \\
    /opt/conda /opt/miniforge3 /opt/miniconda3 /opt/anaconda3; do
    if [ -r "$bokeh_ssh_d/etc/profile.d/conda.sh" ]; then
      . "$bokeh_ssh_d/etc/profile.d/conda.sh"
      if [ -r "$bokeh_ssh_d/etc/profile.d/mamba.sh" ]; then . "$bokeh_ssh_d/etc/profile.d/mamba.sh"; fi
      break
    fi
  done ;;
esac"""

#: `module` is a shell function too; these are where Lmod and Environment Modules put it.
_MODULE = """\
if ! command -v module >/dev/null 2>&1; then
  bokeh_ssh_s=sh; if [ -n "${BASH_VERSION-}" ]; then bokeh_ssh_s=bash; fi
  for bokeh_ssh_d in "${LMOD_PKG-}/init" "${MODULESHOME-}/init" /usr/share/lmod/lmod/init \\
    /usr/share/modules/init /usr/share/Modules/init /opt/cray/pe/lmod/lmod/init; do
    if [ -r "$bokeh_ssh_d/$bokeh_ssh_s" ]; then . "$bokeh_ssh_d/$bokeh_ssh_s"; break; fi
  done
fi"""

#: Reads a program from standard input, its length on a line before it, and runs it.
_TAKE = """\
def take(count):
    data = b""
    while len(data) < count:
        part = os.read(0, count - len(data))
        if not part:
            os._exit(3)
        data += part
    return data
head = take(1)
while head[-1:] != b"\\n":
    head += take(1)
exec(compile(take(int(head)), "<bokeh_ssh supervisor>", "exec", 0, True), {"__name__": "__main__"})
"""

#: What that needs where nothing has run before it.
_ALONE = f"{_CLEAN}\nimport os\n"

#: What a Python does first that looks for packages too: the standard library's own modules come from there,
#: whatever else a path of the person's has.
OWN = f"""\
{_CLEAN}
import os
library = os.path.dirname(os.__file__)
sys.path.sort(key=lambda p: p != library and os.path.basename(p) != "lib-dynload")
"""

#: And once it needs nothing more: what it starts has the path that the person has set.
BACK = f"""\
if {KEPT!r} in os.environ:
    os.environ["PYTHONPATH"] = os.environ.pop({KEPT!r})
"""

#: The first Python: argv is this text, the mark, the package, which of the interpreters this is, and they.
#: It must be understood by Python 2 too, which is still what ``python`` is on some machines.
BOOTSTRAP = (
    OWN
    + f"""\
import json, re
code, mark, need, at = sys.argv[1:5]
paths = sys.argv[5:]
at = int(at)
bokeh = []
def lacks():
    if sys.version_info < {OLDEST_PYTHON!r}:
        return "python", "is Python %d.%d" % sys.version_info[:2]
    if not need:
        return
    from importlib.machinery import PathFinder
    from importlib.util import find_spec
    apart = os.environ.get({KEPT!r}, "").split(os.pathsep)  # where it runs no code of, but the server will
    for name in dict.fromkeys(("bokeh", need)):
        spec = find_spec(name) or PathFinder.find_spec(name, apart if apart != [""] else [])
        if spec is None or spec.origin is None or not spec.submodule_search_locations:
            return "package", "has no " + name
        if name == "bokeh":
            bokeh.append(list(spec.submodule_search_locations)[0])
            for entry in os.listdir(os.path.dirname(bokeh[0])):
                found = re.match(r"bokeh-(\\d+)\\.(\\d+).*-info$", entry)
                if found and (int(found.group(1)), int(found.group(2))) < {OLDEST_BOKEH!r}:
                    return "package", "has Bokeh %s.%s" % found.groups()
def say(**message):
    os.write(1, (mark + json.dumps(message) + "\\n").encode("ascii"))
lack = lacks()
if lack:
    say(event="tried", path=paths[at], kind=lack[0], text=lack[1])
    at += 1
    if at == len(paths):
        say(event="failed", at="interpreter", status=1)
        sys.exit(1)
    os.execv(paths[at], [paths[at], "-c", "import sys; exec(sys.argv[1])", code, mark, need, str(at)] + paths)
say(event="python", path=paths[at], bokeh="".join(bokeh))
"""
    + BACK
    + _TAKE
)
