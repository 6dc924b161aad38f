#!/usr/bin/env bash
# A private SLURM cluster on this machine, for the tests: munged, slurmctld and a slurmd per virtual node, with fake
# GPUs. Everything is in one folder, listens on the loopback alone, and needs neither systemd nor cgroups.
#
#   up.sh DIR              make the cluster in the new folder DIR; then `export SLURM_CONF=DIR/slurm.conf`
#   up.sh DIR node n2      start a node again that `down.sh DIR node n2` crashed
#
# Its shape, from the environment: SLURM_NODES (2); of each SLURM_CPUS (8) and SLURM_GPUS (1); SLURM_SHARDS per GPU (4).
# Exit status 77: SLURM cannot be had here; the last line on stderr is the reason.
set -euo pipefail

ROOT=$1
NODES=${SLURM_NODES:-2} CPUS=${SLURM_CPUS:-8} GPUS=${SLURM_GPUS:-1} SHARDS=${SLURM_SHARDS:-4}
USER_NAME=$(id -un)
PATH=$PATH:/usr/sbin
export SLURM_CONF=$ROOT/slurm.conf

cannot() {
    echo "SLURM cannot be had here: $*" >&2
    exit 77
}

install() {
    [ -n "${SLURM_INSTALL-}" ] || cannot "it is not installed; with SLURM_INSTALL=1 root has it installed by apt-get"
    command -v apt-get >/dev/null || cannot "no apt-get to install slurm-wlm and munge with"
    [ "$(id -u)" = 0 ] || cannot "slurm-wlm and munge are not installed, and only root may install them"
    # Without the recommended packages: they are 40 more, and none is needed.
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >&2 || cannot "apt-get failed, see above"
}

started() { # when process $1 started: with its number, that names one process for ever
    sed 's/.*) //' "/proc/$1/stat" | cut -d' ' -f20
}

daemon() { # daemon NAME COMMAND...: in the foreground of a session of its own, noted in DIR/pids for down.sh
    local name=$1 pid
    shift
    # exec twice, so that $! is the daemon itself. Job control gives it a process group that no Ctrl-C reaches.
    set -m
    (exec "$@" </dev/null >>"$ROOT/log/$name.out" 2>&1) &
    pid=$!
    set +m
    disown "$pid"
    echo "$name $pid $(started "$pid")" >>"$ROOT/pids"
}

wait_for() { # wait_for SECONDS WHAT COMMAND...
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS >= until)); then
            tail -n 15 "$ROOT"/log/*.out >&2
            echo "up.sh: $what is not ready; the ends of the logs are above" >&2
            exit 1
        fi
        sleep 0.1
    done
}

usable() { # usable COUNT [NODE]: are so many nodes up?
    [ "$(sinfo -h -N -o '%t' ${2:+-n "$2"} | grep -cxE 'idle|mix|alloc')" = "$1" ]
}

if [ "${2:-}" = node ]; then
    daemon "slurmd-$3" slurmd -D -N "$3"
    wait_for 20 "node $3" usable 1 "$3"
    exit 0
fi

for command in slurmctld slurmd munged; do command -v $command >/dev/null || install; done
# The daemons listen on the address that the machine's own name has.
getent ahostsv4 "$(hostname)" | grep -q '^127\.' ||
    cannot "$(hostname) is not a loopback address; add '127.0.0.1 $(hostname)' to /etc/hosts"
[ ${#ROOT} -le 60 ] || cannot "the path $ROOT is too long for munge's socket"

mkdir "$ROOT"
mkdir "$ROOT"/{dev,log,munge,run,state}
chmod 700 "$ROOT/munge"
(umask 077 && head -c 1024 /dev/urandom >"$ROOT/munge/key")

# Free ports, asked of the kernel all at once so that they differ.
read -ra PORTS < <(python3 -c '
import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(s.getsockname()[1] for s in held))' $((NODES + 1)))

cat >"$ROOT/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=${PORTS[0]}
SlurmUser=$USER_NAME
SlurmdUser=$USER_NAME
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job is held back: 2 minutes unless told.
AuthInfo=socket=$ROOT/run/munge.socket,cred_expire=5
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool-%n
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmdPidFile=$ROOT/run/slurmd-%n.pid
# No cgroups and no database: processes are followed by their parents, and nothing is accounted.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$ROOT/log/jobs.log
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
# Believe the nodes' numbers of CPUs even where they exceed the machine's.
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=5
KillWait=5
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
GresTypes=gpu,shard
CONF

for ((n = 1; n <= NODES; n++)); do
    mkdir "$ROOT/spool-n$n"
    echo "NodeName=n$n NodeHostname=localhost NodeAddr=127.0.0.1 Port=${PORTS[n]}" \
        "CPUs=$CPUS RealMemory=$((CPUS * 1000)) Gres=gpu:$GPUS,shard:$((GPUS * SHARDS))" >>"$ROOT/slurm.conf"
    # A fake GPU must be a device file: of a plain one SLURM makes no CUDA_VISIBLE_DEVICES.
    for ((g = 0; g < GPUS; g++)); do ln -sf /dev/null "$ROOT/dev/gpu$g"; done
    echo "NodeName=n$n Name=gpu File=$ROOT/dev/gpu[0-$((GPUS - 1))]" >>"$ROOT/gres.conf"
    echo "NodeName=n$n Name=shard Count=$((GPUS * SHARDS))" >>"$ROOT/gres.conf"
done
echo 'PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP' >>"$ROOT/slurm.conf"

daemon munged munged -F --key-file="$ROOT/munge/key" --seed-file="$ROOT/munge/seed" \
    --socket="$ROOT/run/munge.socket" --pid-file="$ROOT/run/munged.pid" --log-file="$ROOT/log/munged.log"
wait_for 10 munged munge -S "$ROOT/run/munge.socket" -n
daemon slurmctld slurmctld -D
for ((n = 1; n <= NODES; n++)); do daemon "slurmd-n$n" slurmd -D -N "n$n"; done
wait_for 20 "one of $NODES nodes" usable "$NODES"
sinfo -N -o '%8N %6t %4c %8m %G'
