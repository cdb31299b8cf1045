"""Signed sessions: ids and tokens as Bokeh makes them, and a server that answers to nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._server.launch_spec import Launch
from bokeh_ssh._server.options import ServerOptions
from bokeh_ssh._server.server import Server
from bokeh_ssh._server.session_ids import new_session_id, token_of

token = pytest.importorskip("bokeh.util.token")
KEYS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(KEYS, KEYS)
def test_ids_are_signed_as_bokeh_does(key: str, other: str) -> None:
    """Bokeh takes our ids, which are as long as its own; with another key it does not."""
    ours = new_session_id(key)
    assert token.check_session_id_signature(ours, key.encode(), True)
    assert len(token.generate_session_id(key.encode(), True)) == len(ours)
    if other != key:
        assert not token.check_session_id_signature(ours, other.encode(), True)


@given(KEYS)
def test_tokens_are_signed_as_bokeh_does(key: str) -> None:
    """The token that a websocket sends has the session and its end, and is taken by Bokeh."""
    session = new_session_id(key)
    made = token_of(session, key, lifetime=100)
    assert token.check_token_signature(made, key.encode(), True)
    assert token.get_session_id(made) == session
    assert 90 < token.get_token_payload(made)["session_expiry"] - time.time() <= 101
    assert not token.check_token_signature(made, b"another" + key.encode(), True)


def test_ids_do_not_repeat() -> None:
    """Every id is another one, as long as Bokeh's own."""
    assert len({new_session_id("k") for _ in range(100)}) == 100
    assert len(new_session_id("k").partition(".")[0]) == 44


if os.name == "posix":
    from local_runner import Bench, processes

    @pytest.fixture
    def bench(tmp_path: Path) -> Iterator[Bench]:
        """A place to start servers from."""
        with Bench(tmp_path) as bench:
            yield bench

    def get(server: Server, query: str = "") -> int:
        route = server.routes[0].rstrip("/")
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{server.port}{route}/{query}", timeout=20
            ) as found:
                return int(found.status)
        except urllib.error.HTTPError as exc:
            with exc:
                return int(exc.code)

    @pytest.mark.parametrize("command", ["bokeh serve", "panel serve"])
    def test_signed_server_answers_to_signed_sessions_only(bench: Bench, command: str) -> None:
        """Without an id, or with one of another key, there is no page; the control is the unsigned server."""
        pytest.importorskip(command.split()[0])
        app = bench.script(
            "app.py", "from bokeh.plotting import curdoc, figure\ncurdoc().add_root(figure())\n"
        )
        server = bench.start(app=(app,), sign=True, command=command)
        assert server.routes == ("/app",)
        route = f"http://127.0.0.1:{server.port}/app"

        def page(query: str) -> int:
            try:
                with urllib.request.urlopen(route + query, timeout=20) as found:
                    return int(found.status)
            except urllib.error.HTTPError as exc:
                with exc:
                    return int(exc.code)

        good = new_session_id(server.key)
        assert page("") == 403
        assert page(f"?bokeh-session-id={new_session_id('another')}") == 403
        assert page("?bokeh-session-id=plain") == 403
        assert page(f"?bokeh-session-id={good}") == 200
        assert page("/metadata") == 200  # how we see that it is ready
        plain = bench.start(app=(app,), command=command)
        assert plain.key == ""
        route = f"http://127.0.0.1:{plain.port}/app"
        assert page("") == 200

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Bokeh's failed client
    def test_script_needs_a_signed_token(bench: Bench) -> None:
        """pull_session() with a token of ours has the session; with Bokeh's own default it has none."""
        from bokeh.client import ClientSession

        app = bench.script(
            "app.py", "from bokeh.plotting import curdoc, figure\ncurdoc().add_root(figure())\n"
        )
        server = bench.start(app=(app,), sign=True)
        url = f"http://127.0.0.1:{server.port}/app"
        # On its own, since Bokeh leaves a refused connection open.
        code = "import sys; from bokeh.client import pull_session as p; p(sys.argv[2], sys.argv[1])"
        words = [sys.executable, "-c", code, url, new_session_id(server.key)]
        assert "HTTP-Error" in subprocess.run(words, capture_output=True, text=True, timeout=60).stderr

        class Signed(ClientSession):
            @property
            def token(self) -> str:
                return token_of(self.id, server.key)

        name: Any = new_session_id(server.key)
        with Signed(session_id=name, websocket_url=url.replace("http", "ws") + "/ws") as session:
            session.connect()
            session.pull()
            assert len(session.document.roots) == 1

    def test_key_travels_over_standard_input_only(bench: Bench) -> None:
        """The key is in no command line, repr or record; who adopts the server gets it."""
        server = bench.start(sign=True)
        session = bench.runners[-1].sessions[-1]
        ticket = server.server_ref
        assert ticket is not None
        assert len(server.key) == 64
        assert not processes(server.key)
        assert server.key not in repr(server) + repr(ticket) + repr(server.launch)
        assert all(server.key not in path.read_text() for path in Path(ticket.place).glob("record*"))
        assert ticket.key == server.key
        assert server.key.encode() in session.written  # the control: that is how it came there
        session.vanish()
        plain = type(ticket)(host="", id=ticket.id)
        again = Server.adopt(bench.runner(), plain, launch=Launch())
        bench.servers.append(again)
        assert again.key == server.key

    def test_key_of_ones_own_is_used(bench: Bench) -> None:
        """BOKEH_SECRET_KEY in env is the key then, so that others who have it can sign too."""
        server = bench.start(sign=True, env={"BOKEH_SECRET_KEY": "my own"})
        assert server.key == "my own"
        assert get(server) == 403
        assert get(server, f"?bokeh-session-id={new_session_id('my own')}") == 200


def test_signing_twice_is_refused() -> None:
    """--session-ids of one's own beside sign= cannot work."""
    with pytest.raises(UsageError, match="session-ids"):
        Launch(sign=True, args=("--session-ids", "unsigned"))
    assert Launch(args=("--session-ids", "unsigned"))


def test_beginning_of_an_option_counts_as_the_option() -> None:
    """Bokeh's parser takes beginnings too; what is the app's own, behind --args, changes nothing."""
    for word in ("--addr=0.0.0.0", "--po=80", "--unix=/tmp/x"):
        with pytest.raises(UsageError, match="cannot be given in args"):
            Launch(args=(word,))
    assert Launch(args=("--prefix=x", "--args", "--addr=0.0.0.0"))  # the control
    with pytest.raises(UsageError, match="session-ids"):
        Launch(sign="port", args=("--session-i=unsigned",))
    with pytest.raises(UsageError, match="--args cannot be given in command"):
        Launch(command="bokeh serve --args")
    for words in (
        "python -m panel serve app.py --args x",
        "env X=1 bokeh serve app.py --port 5",
        "bokeh serve -- x",
    ):
        with pytest.raises(UsageError, match=r"-- |--args |--port "):
            Launch(command=words)
    assert Launch(command="srun --port 5 bokeh serve app.py")  # not Bokeh's option
    signs = ServerOptions(args=["--args", "--session-ids=x"]).launch_spec(5006)
    assert signs.sign == "port"
    assert not ServerOptions(args=["--session-ids=unsigned"]).launch_spec(5006).sign  # the control


def test_module_needs_no_bokeh() -> None:
    """Minting an id imports neither Bokeh nor anything else that is large."""
    code = (
        "import sys, bokeh_ssh._server.session_ids as s; s.new_session_id('k'); print('bokeh' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
