#!/bin/bash
# A small Slurm cluster in namespaces of this machine, for slurm_bed.py; needs root. One "machine" each:
#
#   this machine NET.1 ── login1 NET.11, login2 NET.12 ── ctl (slurmctld), c1 and c2 (slurmd, no SSH service)
#
# usage: slurm_bed.sh up|down|boot NODE|kill NODE|sge    with BASE (a folder), TAG and NET ("10.79.7") set.
# Each has its own network, processes, host name, /tmp, /run, /var/spool, and the settings, users and homes in BASE;
# nothing of this machine's own is changed but for one network interface and the control groups.
set -u
NODES="login1 login2 ctl c1 c2"
declare -A INNER=([login1]=10.77.0.1 [login2]=10.77.0.2 [ctl]=10.77.0.3 [c1]=10.77.0.11 [c2]=10.77.0.12)

on() { # NODE COMMAND...
    local pid
    pid=$(cat "$BASE/run/$1.pid")
    shift
    nsenter -t "$pid" -m -u -n -p -C -- "$@"
}

down() {
    local node pid
    for node in $NODES; do
        pid=$(cat "$BASE/run/$node.pid" 2>/dev/null) && kill -9 "$pid" 2>/dev/null
        rm -f "$BASE/run/$node.pid"
    done
    sleep 0.2
    for node in sw $NODES; do ip netns del "$TAG-$node" 2>/dev/null; done
    ip link del "$TAG" 2>/dev/null
    for node in $NODES; do
        for group in /sys/fs/cgroup/*/"$TAG-$node"; do
            [ -d "$group" ] && find "$group" -depth -type d -exec rmdir {} + 2>/dev/null
        done
    done
    return 0
}

link() { # NODE DEVICE ADDRESS BRIDGE
    ip link add "$2" netns "$TAG-$1" type veth peer name "$1-$2" netns "$TAG-sw"
    ip -n "$TAG-sw" link set "$1-$2" master "$4" up
    ip -n "$TAG-$1" addr add "$3/24" dev "$2"
    ip -n "$TAG-$1" link set "$2" up
}

net() {
    local node bridge
    for node in sw $NODES; do
        ip netns add "$TAG-$node"
        ip -n "$TAG-$node" link set lo up
    done
    for bridge in outer inner; do
        ip -n "$TAG-sw" link add "$bridge" type bridge
        ip -n "$TAG-sw" link set "$bridge" up
    done
    ip link add "$TAG" type veth peer name here netns "$TAG-sw"
    ip -n "$TAG-sw" link set here master outer up
    ip addr add "$NET.1/24" dev "$TAG"
    ip link set "$TAG" up
    link login1 out "$NET.11" outer
    link login2 out "$NET.12" outer
    for node in $NODES; do link "$node" in "${INNER[$node]}" inner; done
}

boot() { # NODE
    local node=$1 group
    rm -f "$BASE/run/$node.pid"
    if [ -e "$BASE/cgroup" ]; then
        for group in /sys/fs/cgroup/*/; do
            [ -w "$group/cgroup.procs" ] && [ "$(basename "$group")" != unified ] && mkdir -p "$group/$TAG-$node"
        done
        group=/sys/fs/cgroup/cpuset
        [ -d "$group/$TAG-$node" ] && cat $group/cpuset.cpus >"$group/$TAG-$node/cpuset.cpus" &&
            cat $group/cpuset.mems >"$group/$TAG-$node/cpuset.mems"
        echo 1 >"/sys/fs/cgroup/memory/$TAG-$node/memory.use_hierarchy" 2>/dev/null
    fi
    setsid nsenter --net="/run/netns/$TAG-$node" unshare --mount --uts --pid --fork --kill-child --mount-proc \
        --propagation private /bin/bash "$0" first "$node" </dev/null >"$BASE/run/$node.log" 2>&1 &
    local outer=$!
    for _ in $(seq 500); do
        [ -e "$BASE/run/$node.up" ] && break
        sleep 0.02
    done
    [ -e "$BASE/run/$node.up" ] || { cat "$BASE/run/$node.log"; return 1; }
    rm "$BASE/run/$node.up"
    tr -d ' ' <"/proc/$outer/task/$outer/children" >"$BASE/run/$node.pid"
    on "$node" runuser -u munge -- /usr/sbin/munged --key-file="$BASE/munge/munge.key" || return 1
    case $node in
        ctl) on ctl /usr/sbin/slurmctld ;;
        c*) on "$node" /usr/sbin/slurmd -N "$node" ;;
        login*)
            on "$node" /usr/sbin/sshd -f "$BASE/etc/sshd_config" -E "$BASE/run/$node.sshd"
            # As on a gateway in front of the login nodes, which forwards, and runs little.
            on "$node" /usr/sbin/sshd -f "$BASE/etc/sshd_config" -p 2222 -o AllowTcpForwarding=yes \
                -o MaxSessions=1
            ;;
    esac
}

first() { # NODE: the first process of a machine, which reaps
    local node=$1 group folder dir
    hostname "$node"
    if [ -e "$BASE/cgroup" ]; then
        for group in /sys/fs/cgroup/*/; do
            [ -d "$group/$TAG-$node" ] || continue
            echo 0 >"$group/$TAG-$node/cgroup.procs" 2>/dev/null
            mount --bind "$group/$TAG-$node" "${group%/}"
        done
    fi
    # What is covered below, and what nobody else may enter, stays where it is: Pythons, and BASE itself.
    local -a keep=("$BASE")
    while read -r dir; do keep+=("$dir"); done <"$BASE/etc/pythons"
    mount -t tmpfs none /mnt
    local number=0
    for dir in "${keep[@]}"; do
        mkdir "/mnt/$number" && mount --rbind "$dir" "/mnt/$number"
        number=$((number + 1))
    done
    for folder in /tmp /run /var/tmp /root; do mount -t tmpfs -o mode=1777 none $folder; done
    chmod 755 /run /root
    number=0
    for dir in "${keep[@]}"; do
        case $dir in
            /tmp/* | /root/* | /run/* | /var/tmp/*) mkdir -p "$dir" && mount --rbind "/mnt/$number" "$dir" ;;
        esac
        number=$((number + 1))
    done
    for folder in /var/spool /var/log /var/lib/munge; do
        mkdir -p $folder
        mount -t tmpfs -o mode=755 none $folder
    done
    mkdir -p /run/sshd /run/munge /var/log/munge /var/spool/slurmd /var/spool/slurmctld /var/log/slurm
    chown munge: /run/munge /var/log/munge /var/lib/munge
    chmod 755 /run/munge
    chmod 700 /var/log/munge /var/lib/munge
    mkdir -p /etc/slurm /home
    [ -d "$BASE/sge" ] && mount --bind "$BASE/sge" /var/lib/gridengine
    mount --bind "$BASE/etc/slurm" /etc/slurm
    mount --bind "$BASE/home" /home
    for folder in passwd shadow group hosts; do mount --bind "$BASE/etc/$folder" /etc/$folder; done
    echo started >"$BASE/run/$node.up"
    trap : TERM
    while :; do
        sleep 1000 &
        wait $!
    done
}

sge() { # Grid Engine beside Slurm: its master on ctl, one queue on c1, submitted to from login1 and login2
    local node
    for node in ctl c1; do
        on $node mkdir -p /var/spool/gridengine/qmaster/job_scripts /var/spool/gridengine/execd \
            /var/spool/gridengine/spooldb
        on $node chown -R sgeadmin: /var/spool/gridengine
    done
    on ctl su -s /bin/sh -c "/usr/share/gridengine/scripts/init_cluster $SGE_ROOT default \
        /var/spool/gridengine/spooldb sgeadmin" sgeadmin >/dev/null || return 1
    echo ctl >"$BASE/sge/default/common/act_qmaster"
    chown sgeadmin "$BASE/sge/default/common/act_qmaster"
    on ctl /usr/sbin/sge_qmaster || return 1
    on ctl bash -c 'cd /tmp
        until qconf -sconf >/dev/null 2>&1; do sleep 0.1; done
        qconf -ah login1,login2,c1; qconf -as login1,login2
        printf "group_name @allhosts\nhostlist c1\n" >hosts; qconf -Ahgrp hosts
        # As often as it can: by default it looks at the queue, and writes its accounting, every 15 s.
        qconf -ssconf | sed "s/^schedule_interval .*/schedule_interval 0:0:1/
            s/^flush_submit_sec .*/flush_submit_sec 1/; s/^flush_finish_sec .*/flush_finish_sec 1/" >conf
        qconf -Msconf conf
        qconf -sconf | sed "s/accounting=true/accounting=true accounting_flush_time=00:00:00/" >global
        qconf -Mconf global'
    on ctl bash -c 'cd /tmp
        qconf -sq | sed "s/^qname .*/qname main.q/; s/^hostlist .*/hostlist @allhosts/; s/^slots .*/slots 4/
            s/^load_thresholds .*/load_thresholds NONE/; s/^shell .*/shell \/bin\/sh/; s/^pe_list .*/pe_list NONE/
            s/^tmpdir .*/tmpdir \/tmp/" >queue
        qconf -Aq queue' || return 1
    on c1 /usr/sbin/sge_execd
}

case $1 in
    up)
        net
        for node in ctl login1 login2 c1 c2; do boot "$node" || exit 1; done
        ;;
    down) down ;;
    sge)
        export SGE_ROOT=/var/lib/gridengine
        sge
        ;;
    boot) boot "$2" ;;
    first) first "$2" ;;
    kill)
        kill -9 "$(cat "$BASE/run/$2.pid")"
        rm "$BASE/run/$2.pid"
        ;;
    on)
        shift
        on "$@"
        ;;
esac
