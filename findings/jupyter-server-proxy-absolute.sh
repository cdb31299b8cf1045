#!/usr/bin/env bash
# jupyter-server-proxy 4.6.0 (Jupyter Server 2.21.1): /proxy/absolute/PORT/... does not pass on the path that it got.
#
# It is documented to pass the whole path on as it is, for servers that are told their prefix (Bokeh's --prefix,
# Streamlit's --server.baseUrlPath). Where the base_url has a quoted character, as that of a JupyterHub user whose name
# is not plain ("joe doe": /user/joe%20doe/), its % is quoted once more: such a server is asked for a prefix that it
# does not have, and every page is its 404. And %2B comes through as a plain +, so what tells the two apart asks for
# another file. /proxy/PORT/..., without the prefix, keeps %20 as it was.
#
# Seen, with --ServerApp.base_url=/user/joe%20doe/ (what the browser asks for -> what the server behind gets):
#
#   /user/joe%20doe/proxy/absolute/PORT/app    -> /user/joe%2520doe/proxy/absolute/PORT/app
#   /user/joe%20doe/proxy/absolute/PORT/x%2By  -> /user/joe%2520doe/proxy/absolute/PORT/x+y
#   /user/joe%20doe/proxy/PORT/a%20b           -> /a%20b
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check jupyter-server==2.21.1 jupyter-server-proxy==4.6.0
export JUPYTER_CONFIG_DIR="$work/config" JUPYTER_DATA_DIR="$work/data" JUPYTER_RUNTIME_DIR="$work/runtime"

cat > try.py <<'PY'
import http.client
import http.server
import socket
import subprocess
import sys
import threading
import time


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers with the path that it was asked for."""

    def do_GET(self):
        body = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def ask(port, path):
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    client.request("GET", path)
    text = client.getresponse().read().decode()
    client.close()
    return text


behind = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
threading.Thread(target=behind.serve_forever, daemon=True).start()
there = behind.server_address[1]
with socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    port = sock.getsockname()[1]
words = ["--no-browser", "--allow-root", "--ServerApp.base_url=/user/joe%20doe/", f"--ServerApp.port={port}"]
words += ["--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.port_retries=0"]
server = subprocess.Popen([sys.executable, "-m", "jupyter_server", *words], stderr=subprocess.DEVNULL)
root = f"/proxy/absolute/{there}"
expected = {
    f"{root}/app": f"/user/joe%2520doe{root}/app",
    f"{root}/x%2By": f"/user/joe%2520doe{root}/x+y",
    f"/proxy/{there}/a%20b": "/a%20b",
}
try:
    for _ in range(600):
        try:
            ask(port, "/user/joe%20doe/api")
            break
        except OSError:
            time.sleep(0.1)
    seen = {path: ask(port, f"/user/joe%20doe{path}") for path in expected}
    for path, got in seen.items():
        print(f"/user/joe%20doe{path} -> {got}")
finally:
    server.terminate()
    server.wait(30)
sys.exit(0 if seen == expected else "it has changed")
PY
env/bin/python try.py
