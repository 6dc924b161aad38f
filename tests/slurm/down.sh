#!/usr/bin/env bash
# End what up.sh started, by the processes that it noted, each only if it still is the one that was started then.
#
#   down.sh DIR            end the cluster and remove its folder
#   down.sh DIR node n2    crash a node: its slurmd and its jobs die at once, without a warning
set -uo pipefail

ROOT=$1
export SLURM_CONF=$ROOT/slurm.conf
[ -f "$ROOT/pids" ] || exit 0

alive() { # alive PID START: that process, not a zombie and not a later one with its number
    [ "$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" {print $20}')" = "$2" ]
}

end() { # end NAME SIGNAL: all noted processes of this name; SIGKILL to what is left after 10 s
    local name pid start tries
    while read -r name pid start; do
        if [ "$name" != "$1" ] || ! alive "$pid" "$start"; then continue; fi
        kill -s "$2" "$pid"
        for ((tries = 0; tries < 100; tries++)); do
            alive "$pid" "$start" || break
            sleep 0.1
        done
        ! alive "$pid" "$start" || kill -s KILL "$pid"
    done <"$ROOT/pids"
}

kill_jobs() { # all processes of the jobs of node $1 of this cluster, or of all its nodes
    local proc environment parent stepds=() others=()
    for proc in /proc/[0-9]*; do
        environment=$(tr '\0' '\n' 2>/dev/null <"$proc/environ") || continue
        grep -qxF "SLURM_CONF=$SLURM_CONF" <<<"$environment" || continue
        # A job's processes know the node that they are on. The slurmstepd that holds them does not.
        grep -qx "SLURMD_NODENAME=${1:-.*}" <<<"$environment" || continue
        others+=("${proc#/proc/}")
        parent=$(awk '$1 == "PPid:" {print $2}' "$proc/status" 2>/dev/null)
        [[ $(readlink "/proc/$parent/exe" 2>/dev/null) != */slurmstepd* ]] || stepds+=("$parent")
    done
    # The slurmstepds first: one that sees its job end reports that end, as no crashed machine would.
    [ ${#others[@]} = 0 ] || kill -s KILL "${stepds[@]}" "${others[@]}" 2>/dev/null
}

if [ "${2:-}" = node ]; then
    end "slurmd-$3" KILL
    kill_jobs "$3"
    exit 0
fi

if timeout 5 scontrol ping >/dev/null 2>&1; then # let the cluster end its jobs itself
    timeout 10 squeue -h -o %A | sort -u | timeout 10 xargs -r scancel
    for ((tries = 0; tries < 100; tries++)); do
        [ -n "$(timeout 5 squeue -h -o %A)" ] || break
        sleep 0.1
    done
fi
mapfile -t nodes < <(cut -d' ' -f1 "$ROOT/pids" | sort -u | grep '^slurmd-')
for name in "${nodes[@]}"; do end "$name" TERM; done
end slurmctld TERM
kill_jobs
end munged TERM
left=$(while read -r name pid start; do ! alive "$pid" "$start" || echo "$name($pid)"; done <"$ROOT/pids")
[ -z "$left" ] || { echo "down.sh: still running: $left" >&2 && exit 1; }
rm -r "$ROOT"
