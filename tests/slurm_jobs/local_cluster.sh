#!/usr/bin/env bash
# A Slurm of its own on this machine, of four virtual nodes n0 to n3 with two pretended GPUs each. Needs root, slurmctld, slurmd and munged.
#   local_cluster.sh start DIR   all its files and sockets are in DIR; then: export SLURM_CONF=DIR/slurm.conf
#   local_cluster.sh stop DIR    cancels its jobs and ends its daemons; what DIR holds stays
set -euo pipefail
action=${1:?start or stop}
dir=$(realpath -m "${2:?a folder}")
host=$(hostname -s)
nodes=(n0 n1 n2 n3)
export SLURM_CONF=$dir/slurm.conf

write_configuration() {
    local ports
    # Below those that the system hands out to connections, one of which would take them before the daemons listen.
    mapfile -t ports < <(python3 -c '
import random, socket
free = []
while len(free) < 5:
    try: free.append(socket.create_server(("", random.randrange(10000, 32000))))
    except OSError: pass
for server in free: print(server.getsockname()[1])')
    cat >"$dir/slurm.conf" <<END
ClusterName=hymeg
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
MessageTimeout=20
KillWait=300
MinJobAge=7200
GresTypes=gpu
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    for i in "${!nodes[@]}"; do
        echo "NodeName=${nodes[i]} NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[i + 1]} CPUs=2 RealMemory=1000 Gres=gpu:2 State=UNKNOWN"
    done >>"$dir/slurm.conf"
    # A GPU needs a device file, which nobody opens here.
    printf 'Name=gpu File=%s\n' /dev/null /dev/zero >"$dir/gres.conf"
}

start() {
    mkdir -p "$dir"/{state,munge,n0,n1,n2,n3}
    chmod 0755 "$dir" "$dir/munge"
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
    munged --force --key-file "$dir/munge/key" --socket "$dir/munge/socket" --pid-file "$dir/munged.pid" --log-file "$dir/munge/log" \
        --seed-file "$dir/munge/seed"
    write_configuration
    slurmctld -f "$SLURM_CONF"
    for node in "${nodes[@]}"; do slurmd -N "$node" -f "$SLURM_CONF"; done
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --Node --states=idle --format %N 2>/dev/null | wc -l)" -eq ${#nodes[@]} ]; then return; fi
        sleep 0.5
    done
    sinfo || true
    tail -n 20 "$dir"/slurmctld.log >&2
    return 1
}

cancel_jobs() {
    timeout 20 scancel --user root || true
    for _ in $(seq 80); do
        [ -n "$(timeout 20 squeue --noheader)" ] || return 0
        sleep 0.5
    done
}

# Daemons end by the process ids that they wrote themselves.
stop() {
    local file pids=()
    if [ -s "$dir/slurmctld.pid" ] && kill -0 "$(<"$dir/slurmctld.pid")" 2>/dev/null; then cancel_jobs; fi
    for file in "$dir"/slurmd.n*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
        [ ! -s "$file" ] || pids+=("$(<"$file")")
    done
    [ ${#pids[@]} -gt 0 ] || return 0
    kill "${pids[@]}" 2>/dev/null || true
    for _ in $(seq 60); do
        kill -0 "${pids[@]}" 2>/dev/null || return 0
        sleep 0.5
    done
    kill -KILL "${pids[@]}" 2>/dev/null || true
}

case $action in
start) start || { stop; exit 1; } ;;
stop) stop ;;
*) echo "local_cluster.sh: '$action': start or stop is needed" >&2; exit 2 ;;
esac
