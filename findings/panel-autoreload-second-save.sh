#!/usr/bin/env bash
# Panel 1.9.4 (Bokeh 3.9.2, watchfiles 1.3.0), panel serve --dev: what is saved within a second of another save is not
# seen, then or later. The page has reloaded with the first save by then, and goes on with that one, as does each new
# page; nothing is logged. Reloading in the browser does not help, nor does saving the app: where the second save was
# of a module that the app imports, that module has to be saved once more.
#
# Panel watches until there is a change, ends the watch, reloads, sleeps for 1 s, and begins another watch, which knows
# nothing of what happened in between. A person does not save twice in a second; an editor that formats what it has just
# saved does, and so do git pull, rsync over a slow line, and code generators, for two files.
#
# panel serve --help: "Whether to autoreload source when script changes. We recommend using --dev instead." No page
# names the second. What helps: save the module once more.
#
# Seen, an app that prints its own version and that of its module, which each load of the page runs:
#
#   module v1                                       app v0, module v1
#   module v2, after 250 ms                         app v0, module v1
#   five seconds later                              app v0, module v1
#   app v1                                          app v1, module v1
#   module v3, alone                                app v1, module v3
set -euo pipefail
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check panel==1.9.4 bokeh==3.9.2 watchfiles==1.3.0
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
mkdir app
save_app() {
    printf '%s\n' "import panel, part" "print('app $1, module', part.V, flush=True)" \
        "panel.pane.Str(part.V).servable()" > app/app.py
}
save_module() { echo "V = '$1'" > app/part.py; }
save_app v0 && save_module v0
env/bin/panel serve app/app.py --dev --port "$port" > out 2> log &
server=$!
for _ in $(seq 300); do ! grep -q 'running at' log || break; sleep 0.2; done

# Load the page, and print what the app has printed then.
load() { curl -s -o /dev/null --max-time 60 "http://localhost:$port/app"; tail -n 1 out; }
load_until() { for _ in $(seq 100); do [ "$(load)" != "$1" ] || return 0; sleep 0.05; done; echo "no $1"; exit 1; }
row() { printf '%-46s  %s\n' "$1" "$2"; seen+="$2; "; }
now() { date +%s%3N; }

seen=
load > /dev/null
for _ in $(seq 5); do
    sleep 4
    save_module v0 && sleep 4
    start=$(now)
    save_module v1
    load_until "app v0, module v1"
    save_module v2
    took=$(($(now) - start))
    [ $took -gt 900 ] || break
done
row "module v1" "app v0, module v1"
row "module v2, after $took ms" "$(load)"
sleep 5
row "five seconds later" "$(load)"
save_app v1 && load_until "app v1, module v1"
sleep 4
row "app v1" "$(load)"
save_module v3
sleep 4
row "module v3, alone" "$(load)"
[ "$seen" = "app v0, module v1; app v0, module v1; app v0, module v1; app v1, module v1; app v1, module v3; " ] ||
    { cat log && echo "it has changed" && exit 1; }
