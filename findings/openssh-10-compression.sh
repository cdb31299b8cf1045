#!/usr/bin/env bash
# OpenSSH 10.6p1 (Debian 1:10.6p1-1): `ssh -C` still negotiates zlib@openssh.com, the stream is still zlib's, and any
# peer inflates it; but repetitions are no longer found. Only the frequency of bytes is used (Huffman codes), so that
# nothing gets smaller than an eighth, and text that repeats hardly gets smaller than half. Whoever uses -C to fetch
# JavaScript, logs or tables over a slow line gets little of what releases before it gave. Nothing says so in the
# handshake: name, level and direction look as ever.
#
# Seen: 1,000,000 bytes of one line, over and over, sent by `ssh -C` to an sshd of 9.2p1, and back:
#
#   ssh 9.2p1,  sent by it: factor 0.00     received from sshd 9.2p1: factor 0.00
#   ssh 10.6p1, sent by it: factor 0.44     received from sshd 9.2p1: factor 0.00
#
# Runs on Debian or a relative with openssh-server (an sshd before 10) and apt, as root; needs Debian's unstable suite.
set -euo pipefail
work=$(mktemp -d)
sshd=
trap '[ -z "$sshd" ] || kill "$sshd"; rm -rf "$work"' EXIT
cd "$work"

# OpenSSH 10.6 and its libraries, unpacked beside the system's.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 -v security)
mkdir -p apt/lists/partial apt/cache/archives/partial debs new
: > apt/status
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" > apt/sources
options=(-qq -o "Dir::Etc::sourcelist=$work/apt/sources" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$work/apt/lists" -o "Dir::State::status=$work/apt/status" -o "Dir::Cache=$work/apt/cache" -o Acquire::Languages=none
    -o APT::Sandbox::User=root)
apt-get "${options[@]}" update
(cd debs && apt-get "${options[@]}" download openssh-client=1:10.6p1-1 libc6 libcom-err2 libgcc-s1 libgssapi-krb5-2 \
    libk5crypto3 libkeyutils1 libkrb5-3 libkrb5support0 libpcre2-8-0 libselinux1 libssl3t64 libzstd1 zlib1g)
for package in debs/*.deb; do dpkg-deb -x "$package" new; done
libraries=$(echo new/usr/lib/*-linux-gnu)
loader=$(find new -name 'ld-linux-*.so.*' | head -n 1)
new() { "$loader" --library-path "$libraries" new/usr/bin/ssh "$@"; }

ssh-keygen -q -t ed25519 -N '' -f host_key
ssh-keygen -q -t ed25519 -N '' -f id
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
printf '%s\n' "ListenAddress 127.0.0.1" "Port $port" "HostKey $work/host_key" "AuthorizedKeysFile $work/id.pub" \
    "PidFile none" "StrictModes no" "UsePAM no" > sshd_config
mkdir -p /run/sshd
/usr/sbin/sshd -D -f sshd_config -E sshd.log &
sshd=$!
for _ in $(seq 50); do grep -qs listening sshd.log && break; sleep 0.1; done

yes "the same line, again and again" | head -c 1000000 > data || true
factors() { # the factors of both directions, as ssh says them at its end
    "$@" -F none -C -v -p "$port" -i id -o StrictHostKeyChecking=no -o UserKnownHostsFile=known \
        "$(id -un)@127.0.0.1" "cat > /dev/null; cat $work/data" < data 2>&1 > /dev/null |
        sed -n 's/.*compress \(outgoing\|incoming\): .*factor \([0-9.]*\).*/\2/p' | tr '\n' ' '
}
old=$(factors ssh)
recent=$(factors new)
echo "ssh of the system, sent and received: $old"
echo "ssh 10.6p1, sent and received:        $recent"
[ "$old" = "0.00 0.00 " ] && [ "$recent" = "0.44 0.00 " ]
