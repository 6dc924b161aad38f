#!/usr/bin/env bash
# The Atari 100k benchmark, 26 games x 5 seeds, on one machine or on a SLURM cluster.
#
#   ./benchmark.sh                                            on this machine: its GPUs, or its CPU if it has none
#   ./benchmark.sh --games Pong,Krull --seeds 0-1             some of the runs
#   ./benchmark.sh --script jedi_atari_stochastic.py          another script with the same arguments
#   ./benchmark.sh -- --batch-size 64                         what follows -- goes to every run
#   ./benchmark.sh --slurm --partition gpu --time 1-00:00:00  a job array
#   ./benchmark.sh --status                                   the table of runs, at any time
#   ./benchmark.sh --dry-run                                  print commands and cost, do nothing
#
# The same call again carries on: finished runs are skipped, all others resumed from their last checkpoint.
# Each run has the folder OUT/<game>/seed<k>, with its log.txt and, once it is finished, its result.json.
#
# Which runs
#   --games LIST         Pong,Krull,... or all (default: all 26)
#   --seeds LIST         0-4 or 0,1,7 (default: 0-4)
#   --script FILE        what to run (default: jedi_atari.py, beside this file)
#   --preset NAME        the script's preset (default: paper)
#   --out DIR            folder of all runs (default: runs/<script>-<preset>)
#   --python COMMAND     the Python to run it with (default: python)
#   --threads N          CPU threads of each run (default: the cores shared out evenly; with --slurm 4)
# On one machine
#   --runs-per-gpu K     runs that share a GPU (default: 1); CUDA_VISIBLE_DEVICES chooses the GPUs
#   --jobs N             use CPUs only, N runs at once (default where there is no GPU: 1)
# On a cluster
#   --slurm              submit a job array of what is missing and not yet queued; each task is a pool as above
#   --partition NAME, --account NAME, --time LIMIT, --mem SIZE    as sbatch has them; default: the site's
#   --gpus [TYPE:]N      GPUs of a task, which makes N x K runs (default: 1); 0: --jobs runs on CPUs
#   --shards N           in place of --gpus: one run per task, on N shards of a GPU
#   --max-tasks N        at most N tasks at once
#   --grace SECONDS      warning before the time limit, to stop and queue again (default: 120)
#   --slurm-arg ARG      any other option of sbatch, such as --slurm-arg=--qos=high; may be repeated
# Without running anything
#   --dry-run            the commands and the GPU-hours
#   --hours-per-run H    hours that a run takes when K share a GPU; default: the mean of the finished runs in OUT
#   --status             the table of runs and the ends of the failed runs' logs
#   --help
#
# Exit status: 0 all runs done (--slurm: done or queued), 1 some failed or missing, 2 bad input, 128+n on signal n.
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "benchmark.sh: error: this is bash $BASH_VERSION; 4.4 or later is needed" >&2
    exit 2
fi

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ALL_GAMES=(Alien Amidar Assault Asterix BankHeist BattleZone Boxing Breakout ChopperCommand CrazyClimber DemonAttack
    Freeway Frostbite Gopher Hero Jamesbond Kangaroo Krull KungFuMaster MsPacman Pong PrivateEye Qbert RoadRunner
    Seaquest UpNDown)
HOST=$(uname -n) # not HOSTNAME: bash takes that from the environment, and SLURM from the machine of the submission
TAIL=5 # lines of a failed run's log that are shown

die() { # bad input: one line that says what would be right
    printf 'benchmark.sh: error: %s\n' "$*" >&2
    exit 2
}
fail() { # the world is not as it should be
    printf 'benchmark.sh: failed: %s\n' "$*" >&2
    exit 1
}
note() {
    [[ ! -t 1 || ! -t 2 ]] || printf '\r\033[K' # over the status line
    printf 'benchmark.sh: %s\n' "$*" >&2
}

# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------

GAMES_ARG=all SEEDS_ARG=0-4 SCRIPT=$HERE/jedi_atari.py PRESET=paper OUT='' PYTHON=python THREADS=''
RUNS_PER_GPU='' JOBS='' PARTITION='' ACCOUNT='' TIME='' MEM='' GPUS='' SHARDS='' MAX_TASKS='' GRACE='' HOURS=''
SLURM_ARGS=() EXTRA=() SLURM='' DRY='' STATUS='' TASK=''

parse() {
    local name value
    while (($#)); do
        case $1 in
            --) EXTRA=("${@:2}") && return ;;
            --help | -h) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 0 ;;
            --slurm) SLURM=1 && shift && continue ;;
            --dry-run) DRY=1 && shift && continue ;;
            --status) STATUS=1 && shift && continue ;;
            --*=*) name=${1%%=*} value=${1#*=} && shift ;;
            *) name=$1 value=${2-} && shift $(($# > 1 ? 2 : 1)) ;;
        esac
        case $name in
            --games) GAMES_ARG=$value ;;
            --seeds) SEEDS_ARG=$value ;;
            --script) SCRIPT=$value ;;
            --preset) PRESET=$value ;;
            --out) OUT=$value ;;
            --python) PYTHON=$value ;;
            --threads) THREADS=$(number "$name" "$value" 1 1024) ;;
            --runs-per-gpu) RUNS_PER_GPU=$(number "$name" "$value" 1 64) ;;
            --jobs) JOBS=$(number "$name" "$value" 1 1024) ;;
            --partition) PARTITION=$value ;;
            --account) ACCOUNT=$value ;;
            --time) TIME=$value ;;
            --mem) MEM=$value ;;
            --gpus)
                GPUS=$value
                number "$name" "${value##*:}" 0 64 >/dev/null
                ;;
            --shards) SHARDS=$(number "$name" "$value" 1 1024) ;;
            --max-tasks) MAX_TASKS=$(number "$name" "$value" 1 100000) ;;
            --grace) GRACE=$(number "$name" "$value" 1 65535) ;;
            --slurm-arg) SLURM_ARGS+=("$value") ;;
            --hours-per-run)
                [[ $value =~ ^[0-9]{1,5}(\.[0-9]{1,4})?$ && $value =~ [1-9] ]] ||
                    die "--hours-per-run is '$value'; it must be a number above 0, such as 3 or 2.5"
                HOURS=$value
                ;;
            --task) TASK=$value ;; # internal: the file that lists the runs of each task of a job array
            --slurm | --dry-run | --status) die "$name takes no value" ;;
            -*) die "unknown option $name; --help lists them, and arguments of the script go after --" ;;
            *) die "stray argument '$name'; --help lists the options, and arguments of the script go after --" ;;
        esac
        # Only the value of --slurm-arg is an option by nature; of another option it was forgotten.
        [[ -n $value && ($value != --* || $name = --slurm-arg) ]] || die "$name needs a value; see --help"
    done
}

number() { # number NAME VALUE LOW HIGH: prints the value
    [[ $2 =~ ^(0|[1-9][0-9]{0,9})$ ]] && (($2 >= $3 && $2 <= $4)) && echo "$2" && return
    die "$1 is '$2'; it must be a whole number from $3 to $4"
}

read_games() { # GAMES from --games
    local game known
    declare -A seen=()
    [[ $GAMES_ARG = all ]] && GAMES=("${ALL_GAMES[@]}") && return
    IFS=, read -ra GAMES <<<"$GAMES_ARG"
    [[ ${#GAMES[@]} -gt 0 && $GAMES_ARG != *, ]] || die "--games is '$GAMES_ARG'; it must be names with commas between"
    for game in "${GAMES[@]}"; do
        if [[ " ${ALL_GAMES[*]} " != *" $game "* || -z $game || $game = *' '* ]]; then
            for known in "${ALL_GAMES[@]}"; do
                [[ ${known,,} != "${game,,}" ]] || die "--games: unknown game '$game'; did you mean $known?"
            done
            die "--games: unknown game '$game'; known games: ${ALL_GAMES[*]}"
        fi
        [[ -z ${seen[$game]-} ]] || die "--games names $game twice"
        seen[$game]=1
    done
}

read_seeds() { # SEEDS from --seeds
    local part first last seed
    declare -A seen=()
    SEEDS=()
    [[ $SEEDS_ARG =~ ^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$ ]] ||
        die "--seeds is '$SEEDS_ARG'; it must be numbers and ranges with commas between, such as 0-4 or 0,1,7"
    for part in ${SEEDS_ARG//,/ }; do
        first=$(number --seeds "${part%-*}" 0 2147483647)
        last=$(number --seeds "${part#*-}" 0 2147483647)
        ((first <= last)) || die "--seeds: the range $part ends before it begins"
        ((last - first < 1000)) || die "--seeds: the range $part holds more than 1000 seeds"
        for ((seed = first; seed <= last; seed++)); do
            [[ -z ${seen[$seed]-} ]] || die "--seeds names $seed twice"
            seen[$seed]=1
            SEEDS+=("$seed")
        done
    done
}

absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac }

check_options() { # what contradicts itself, is not there or cannot be written; nothing is written before this is passed
    local option
    [[ -n $SLURM || -n $TASK ]] || for option in PARTITION ACCOUNT TIME MEM GPUS SHARDS MAX_TASKS GRACE; do
        [[ -z ${!option} ]] || die "--$(tr '[:upper:]_' '[:lower:]-' <<<"$option") goes with --slurm"
    done
    [[ -n $SLURM || ${#SLURM_ARGS[@]} -eq 0 ]] || die "--slurm-arg goes with --slurm"
    [[ -z $TASK || (-f $TASK && ${SLURM_ARRAY_TASK_ID-} =~ ^[0-9]+$) ]] ||
        die "--task is for the job arrays that --slurm submits"
    [[ -z $STATUS || -z $SLURM$DRY ]] || die "--status goes with neither --slurm nor --dry-run: it shows every run"
    [[ -z $JOBS || -z $RUNS_PER_GPU ]] || die "--jobs is for CPUs and --runs-per-gpu for GPUs; give one of them"
    [[ -z $SHARDS || -z $GPUS$RUNS_PER_GPU$JOBS ]] ||
        die "--shards gives one run to each task; it goes with none of --gpus, --runs-per-gpu and --jobs"
    [[ -z $JOBS || -z $SLURM || ${GPUS##*:} = 0 ]] || die "--slurm --jobs needs --gpus 0; with GPUs use --runs-per-gpu"
    [[ ${GPUS##*:} != 0 || -z $RUNS_PER_GPU ]] || die "--gpus 0 goes with --jobs, not with --runs-per-gpu"
    for option in "${EXTRA[@]%%=*}"; do
        case ${option//_/-} in # as tyro reads them
            --preset | --seed | --env-id | --threads | --run-dir | --eval-only | --help | -h | \
                --resume | --no-resume | --dry-run | --no-dry-run)
                die "$option after --: this is for benchmark.sh to say; use its own options" ;;
        esac
    done
    [[ $SCRIPT = */* || -f $SCRIPT ]] || SCRIPT=$HERE/$SCRIPT
    [[ -f $SCRIPT && -r $SCRIPT ]] || die "--script: there is no file $SCRIPT; jedi_atari.py is the default"
    SCRIPT=$(absolute "$SCRIPT")
    [[ $PRESET =~ ^[A-Za-z0-9_.-]+$ ]] || die "--preset is '$PRESET'; it must be a preset of the script, such as paper"
    command -v "$PYTHON" >/dev/null || die "there is no command '$PYTHON'; name your Python with --python"
    PYTHON=$(command -v "$PYTHON")
    NAME=$(basename "$SCRIPT" .py)
    OUT=$(absolute "${OUT:-runs/$NAME-$PRESET}")
    check_folder
}

check_folder() { # can OUT be made and written, and were the runs in it begun with the same arguments?
    local above=$OUT
    while [[ ! -e $above ]]; do above=$(dirname "$above"); done
    [[ -d $above ]] || die "--out: $OUT cannot be made: $above is no folder"
    [[ -n $STATUS || (-w $above && -x $above) ]] ||
        die "--out: $OUT cannot be written: no permission in $above; choose another folder"
    [[ -z $STATUS ]] || return 0
    SETTINGS="$(basename "$SCRIPT") --preset $PRESET${EXTRA[*]:+$(printf ' %q' "${EXTRA[@]}")}"
    if [[ -f $OUT/benchmark.txt && $(<"$OUT/benchmark.txt") != "$SETTINGS" ]]; then
        die "--out: the runs in $OUT are of '$(<"$OUT/benchmark.txt")', not of '$SETTINGS'; choose another folder"
    fi
}

check_arguments() { # a flag that the script does not know would make every run fail; say so once, now
    local said
    said=$("$PYTHON" "$HERE/benchmark/pool.py" check "$SCRIPT" --env-id "${GAMES[0]}" --seed "${SEEDS[0]}" \
        --preset "$PRESET" "${EXTRA[@]}" 2>&1) || die "$(tail -n 1 <<<"$said")"
}

make_out() {
    mkdir -p "$OUT" 2>/dev/null || die "--out: $OUT cannot be made; choose another folder"
    (: >"$OUT/.lock") 2>/dev/null || die "--out: $OUT cannot be written; choose another folder"
    if command -v flock >/dev/null; then # two pools on one folder would start the same runs
        exec 9>"$OUT/.lock"
        flock -n -E 75 9 || (($? != 75)) || # other statuses: a file system without locks
            die "another benchmark.sh is at work in $OUT; see --status, or choose another --out"
    fi
    echo "$SETTINGS" >"$OUT/benchmark.txt"
}

# ----------------------------------------------------------------------------------------------------------------------
# Where the runs stand: from their folders and from SLURM's queue; nothing else is remembered
# ----------------------------------------------------------------------------------------------------------------------

declare -A RESULT=() RETURN=() SCORE=() WALL=() QUEUE=() STATE=() NOTE=()

read_results() { # read_results RUN...: what their result.json say
    local run word a b c
    while IFS=$'\t' read -r run word a b c; do
        RESULT[$run]=$word
        case $word in
            ok) RETURN[$run]=$a SCORE[$run]=$b WALL[$run]=$c ;;
            broken) NOTE[$run]="result.json $a" ;;
        esac
    done < <(printf '%s\n' "$@" | "$PYTHON" "$HERE/benchmark/pool.py" results "$OUT")
    [[ -n ${RESULT[${!#}]-} ]] || fail "$PYTHON cannot read the results in $OUT"
}

read_queue() { # the runs that SLURM has queued or is running; fails if it does not answer
    local listed name index state run runs file
    QUEUE=()
    compgen -G "$OUT/slurm/*/tasks.txt" >/dev/null || return 0 # nothing was ever submitted
    listed=$(squeue --noheader --array --user="$(id -un)" --format='%j|%K|%T' 2>/dev/null) || return 1
    while IFS='|' read -r name index state; do
        # The job's name is its folder's, so that a job is known even if this script died right after sbatch.
        file=$OUT/slurm/$name/tasks.txt
        [[ -f $file && $index =~ ^[0-9]+$ ]] || continue
        read -ra runs < <(sed -n "$((index + 1))p" "$file") || continue
        for run in "${runs[@]}"; do QUEUE[$run]=$state; done
    done <<<"$listed"
}

start_time() { # of process $1, which tells it from a later one with its number; nothing if it has ended
    if [[ -d /proc/self ]]; then
        sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" {print $20}'
    else
        ps -o lstart= -p "$1" | tr ' ' _
    fi
}

read_state() { # read_state RUN: sets STATE to done, running, queued, failed, stopped or waiting, and NOTE
    local run=$1 dir=$OUT/$1 word='' a='' b='' c='' queue=${QUEUE[$1]-}
    if [[ ${RESULT[$run]} = ok ]]; then
        STATE[$run]='done' NOTE[$run]=''
        return
    fi
    [[ ! -r $dir/state.txt ]] || read -r word a b c <"$dir/state.txt" || :
    case $word in
        running) # a host, a process and its start time
            if [[ $a = "$HOST" && -n $c && $(start_time "$b") = "$c" ]] || [[ -n $queue && $queue != PENDING ]]; then
                STATE[$run]=running
                NOTE[$run]="on $a"
            else
                STATE[$run]=stopped
                NOTE[$run]="${NOTE[$run]:+${NOTE[$run]}; }broken off on $a"
            fi
            ;;
        ended) # the status
            case $a,${RESULT[$run]} in
                129,* | 130,* | 138,* | 143,*) STATE[$run]=stopped && NOTE[$run]="${NOTE[$run]:-by a signal}" ;;
                stopped,*) STATE[$run]=stopped && NOTE[$run]="${NOTE[$run]:-while it began}" ;;
                0,broken) STATE[$run]=stopped ;; # it was finished, and its result was spoilt afterwards
                137,*) STATE[$run]=failed && NOTE[$run]="status 137: killed, perhaps for want of memory" ;;
                *) STATE[$run]=failed && NOTE[$run]="status $a${NOTE[$run]:+; ${NOTE[$run]}}" ;;
            esac
            ;;
        *)
            STATE[$run]=waiting
            [[ ! -e $dir/checkpoint.pt && ${RESULT[$run]} != broken ]] || STATE[$run]=stopped
            ;;
    esac
    # A run that failed in a task that still has others shows as failed, though it will not be submitted again yet.
    if [[ -n $queue && ${STATE[$run]} != running && (${STATE[$run]} != failed || $queue = PENDING) ]]; then
        STATE[$run]=queued NOTE[$run]="SLURM: ${queue,,}"
    fi
}

read_states() {
    local run
    read_results "${RUNS[@]}"
    for run in "${RUNS[@]}"; do read_state "$run"; done
}

count() { # count STATE...: runs in these states
    local run state n=0
    for run in "${RUNS[@]}"; do for state in "$@"; do [[ ${STATE[$run]} != "$state" ]] || n=$((n + 1)); done; done
    echo "$n"
}

clock() { # seconds -> 3:04, 2:03:04 or 1 d 02:03:04
    local s=$1
    if ((s >= 86400)); then
        printf '%d d %02d:%02d:%02d' $((s / 86400)) $((s / 3600 % 24)) $((s / 60 % 60)) $((s % 60))
    elif ((s >= 3600)); then
        printf '%d:%02d:%02d' $((s / 3600)) $((s / 60 % 60)) $((s % 60))
    else
        printf '%d:%02d' $((s / 60)) $((s % 60))
    fi
}

seconds_per_run() { # --hours-per-run, or the mean of the finished runs; nothing if neither is there
    local run sum=0 n=0
    [[ -z $HOURS ]] || { awk -v h="$HOURS" 'BEGIN {printf "%d", h * 3600}' && return; }
    for run in "${RUNS[@]}"; do [[ -z ${WALL[$run]-} ]] || sum=$((sum + WALL[$run])) n=$((n + 1)); done
    ((n == 0)) || echo $((sum / n))
}

list_failed() { # the failed runs and the ends of their logs
    local run
    for run in "${RUNS[@]}"; do
        [[ ${STATE[$run]} = failed ]] || continue
        printf '\nfailed: %s (%s), %s\n' "$run" "${NOTE[$run]}" "$OUT/$run/log.txt"
        tail -n $TAIL "$OUT/$run/log.txt" 2>/dev/null | cut -c 1-300 | sed 's/^/    /' || :
    done
}

summary() {
    echo "$(count 'done') of ${#RUNS[@]} done, $(count running) running, $(count failed) failed," \
        "$(count queued) queued, $(count waiting stopped) waiting"
}

show_status() {
    local run took
    read_queue || note "SLURM's squeue does not answer: what is queued is not known"
    read_states
    [[ -d $OUT ]] || note "$OUT is not there yet: nothing was begun"
    printf '%-15s %5s  %-8s %10s %8s %14s  %s\n' game seed state return human time note
    for run in "${RUNS[@]}"; do
        took=${WALL[$run]-}
        [[ -z $took ]] || took=$(clock "$took")
        printf '%-15s %5s  %-8s %10s %8s %14s  %s\n' "${run%%/*}" "${run##*/seed}" "${STATE[$run]}" \
            "${RETURN[$run]:--}" "${SCORE[$run]:--}" "${took:--}" "${NOTE[$run]-}"
    done
    list_failed
    printf '\n%s\n%s\n' "$OUT" "$(summary)"
    (($(count 'done') == ${#RUNS[@]}))
}

# ----------------------------------------------------------------------------------------------------------------------
# The pool: runs of this machine, or of one task of a job array
# ----------------------------------------------------------------------------------------------------------------------

find_devices() { # DEVICES: the GPUs to use; SLOTS: the device of each of the runs that go at once ('' for a CPU)
    local listed k device
    DEVICES=() SLOTS=()
    if [[ -z $JOBS ]]; then
        if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then # as the user, or SLURM, chose
            [[ $CUDA_VISIBLE_DEVICES =~ ^(|-1|NoDevFiles)$ ]] || IFS=, read -ra DEVICES <<<"$CUDA_VISIBLE_DEVICES"
        elif listed=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null); then
            mapfile -t DEVICES <<<"$listed"
        fi
        [[ ${#DEVICES[@]} -gt 0 || -z $TASK ]] || fail "SLURM gave this task no GPU (CUDA_VISIBLE_DEVICES is not set)"
        [[ ${#DEVICES[@]} -gt 0 || -z $RUNS_PER_GPU ]] || die "--runs-per-gpu: there is no GPU here; use --jobs"
    fi
    if ((${#DEVICES[@]})); then
        # 1: packing more runs on a GPU has not been measured.
        for ((k = 0; k < ${RUNS_PER_GPU:-1}; k++)); do for device in "${DEVICES[@]}"; do SLOTS+=("$device"); done; done
    else
        for ((k = 0; k < ${JOBS:-1}; k++)); do SLOTS+=(''); done
    fi
}

usable_cores() { # usable_cores CGROUP: those of this machine, or fewer where a container has a limit
    local cores quota='' period='' # microseconds in each period; max or -1: no limit
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    if [[ -r $1/cpu.max ]]; then
        read -r quota period <"$1/cpu.max"
    elif [[ -r $1/cpu/cpu.cfs_quota_us ]]; then # cgroup version 1
        quota=$(<"$1/cpu/cpu.cfs_quota_us") period=$(<"$1/cpu/cpu.cfs_period_us")
    fi
    [[ $quota =~ ^[1-9][0-9]*$ ]] && quota=$(((quota + period - 1) / period)) || quota=$cores
    echo $((quota < cores ? quota : cores))
}

find_threads() { # THREADS of a run, so that the runs of this machine share its cores
    local cores
    cores=$(usable_cores /sys/fs/cgroup)
    [[ -n $THREADS ]] || THREADS=$((cores / ${#SLOTS[@]} > 0 ? cores / ${#SLOTS[@]} : 1))
}

make_command() { # make_command RUN SLOT: COMMAND begins the run or carries it on
    local run=$1 dir=$OUT/$1
    COMMAND=(env "OMP_NUM_THREADS=$THREADS" "CUDA_VISIBLE_DEVICES=${SLOTS[$2]}" "$PYTHON" "$SCRIPT"
        --env-id "${run%%/*}" --seed "${run##*/seed}" --preset "$PRESET" --run-dir "$dir" --resume)
    # A run goes on with the threads that it was begun with: their number is part of a result on CPUs.
    [[ -e $dir/args.json ]] || COMMAND+=(--threads "$THREADS")
    COMMAND+=("${EXTRA[@]}")
}

write_state() { # write_state RUN WORDS...
    printf '%s\n' "${*:2}" >"$OUT/$1/state.txt.tmp"
    mv "$OUT/$1/state.txt.tmp" "$OUT/$1/state.txt"
}

SIGNALS=(INT TERM HUP USR1)
STOP='' # the signal that asked us to stop
SHOWN='' SHOWN_AT=-1000 LEFT='' LEFT_AT=-1000
declare -a PIDS=() WHAT=() BEGAN=() # of each slot: its process, its run, and when that began

stop() { # a run needs no warning: it will carry on from its last checkpoint
    local pid
    STOP=${STOP:-$1}
    for pid in "${PIDS[@]}"; do [[ -z $pid ]] || kill -s TERM "$pid" 2>/dev/null || :; done
}

begin() { # begin RUN SLOT
    local dir=$OUT/$1 word early=()
    read_results "$1" # days may have passed since it was last looked at
    read_state "$1"
    case ${STATE[$1]} in
        done) return ;;
        running) note "$1 is being run by another process (${NOTE[$1]}): left alone" && return ;;
    esac
    if ! mkdir -p "$dir" || ! : >>"$dir/log.txt"; then
        STATE[$1]=failed NOTE[$1]="its folder cannot be written"
        return
    fi
    if [[ ${RESULT[$1]} = broken ]]; then
        note "$1: ${NOTE[$1]}; the run counts as unfinished, the file is kept as result.json.broken"
        mv -f "$dir/result.json" "$dir/result.json.broken"
    fi
    make_command "$1" "$2"
    printf '=== %s %s: %s\n' "$(date '+%F %T')" "$HOST" "$(printf '%q ' "${COMMAND[@]}")" >>"$dir/log.txt"
    exec_run "$dir" 9>&- & # without descriptor 9 the lock of OUT stays ours alone
    PIDS[$2]=$! WHAT[$2]=$1 BEGAN[$2]=$SECONDS
    write_state "$1" running "$HOST" "${PIDS[$2]}" "$(start_time "${PIDS[$2]}")"
    STATE[$1]=running
    # Until it says so, it ignores signals as the pool does: one that has come in between must wait.
    while read -r -t 10 -u 8 word && [[ $word != started ]]; do early+=("$word"); done
    for word in "${early[@]}"; do stop "$word"; done
}

# The pool ignores signals, and a run would inherit that: pool.py undoes it, then writes "started" to descriptor 8.
exec_run() { exec "$PYTHON" "$HERE/benchmark/pool.py" start "${COMMAND[@]}" </dev/null >>"$1/log.txt" 2>&1; }

end() { # end SLOT: its process has ended
    local run=${WHAT[$1]} status=0
    wait "${PIDS[$1]}" 2>/dev/null || status=$?
    PIDS[$1]='' WHAT[$1]=''
    NOTE[$run]=''
    read_results "$run"
    # Asked to stop, a run may also end by being struck in the middle of its start: that is no failure of its own.
    if [[ -n $STOP && ${RESULT[$run]} != ok && ! $status =~ ^(130|138|143)$ ]]; then
        printf '=== stopped by a signal, with status %s\n' $status >>"$OUT/$run/log.txt"
        status=stopped
    fi
    write_state "$run" ended "$status"
    read_state "$run"
    LEFT_AT=-1000
    [[ ${STATE[$run]} != failed ]] || note "$run failed (${NOTE[$run]}), see $OUT/$run/log.txt"
}

time_left() { # from what the running runs say of themselves and, for the waiting ones, from what a run takes
    local each slot share seconds sum=0 longest=0 n=0 total=0 waiting
    each=$(seconds_per_run)
    for slot in "${!PIDS[@]}"; do
        [[ -n ${PIDS[$slot]} ]] || continue
        # A line `epoch 3/99, ...` ends an epoch: epochs to come over those made here, but for 0, which trains nothing.
        share=$(awk '/^=== / {first = ""}
            /^epoch [1-9][0-9]*\/[0-9]+,/ {split($2, e, /[\/,]/); if (first == "") first = e[1]}
            END {if (first != "") print (e[2] - e[1]) / (e[1] - first + 1)}' "$OUT/${WHAT[$slot]}/log.txt") || share=''
        if [[ -n $share ]]; then
            seconds=$(awk -v s=$((SECONDS - BEGAN[slot])) -v k="$share" 'BEGIN {printf "%d", s * k}')
            total=$((total + seconds + SECONDS - BEGAN[slot])) n=$((n + 1))
        elif [[ -n $each ]]; then
            seconds=$((each > SECONDS - BEGAN[slot] ? each - SECONDS + BEGAN[slot] : 0))
        else
            return 0
        fi
        sum=$((sum + seconds)) longest=$((seconds > longest ? seconds : longest))
    done
    waiting=$(count waiting stopped)
    [[ -n $each || $n -eq 0 ]] || each=$((total / n))
    [[ -n $each || $waiting -eq 0 ]] || return 0
    sum=$(((sum + waiting * ${each:-0}) / ${#SLOTS[@]}))
    clock $((sum > longest ? sum : longest))
}

status_line() {
    local text every=600
    [[ ! -t 1 ]] || every=1
    if ((SECONDS - LEFT_AT >= (${#LEFT} ? 10 : 2))); then
        LEFT=$(time_left)
        LEFT_AT=$SECONDS
    fi
    text="$(count 'done') done, $(count running) running, $(count failed) failed, $(count waiting stopped) waiting"
    [[ $text != "$SHOWN" ]] || ((SECONDS - SHOWN_AT >= every)) || return 0
    SHOWN=$text SHOWN_AT=$SECONDS
    text+=", time left: ${LEFT:-not known yet}${STOP:+; stopping}"
    if [[ -t 1 ]]; then printf '\r\033[K%s' "$text"; else echo "$text"; fi
}

pool() { # run all of RUNS that are not finished; returns 0 if all are in the end
    local todo=() run slot busy signal
    trap '' "${SIGNALS[@]}" # guard_pool hears them
    trap 'stop EXIT' EXIT # an error of this script leaves no run behind
    for run in "${RUNS[@]}"; do
        if [[ -n ${QUEUE[$run]-} ]]; then
            note "$run is in SLURM's queue: left to it"
        elif [[ ${STATE[$run]} = running ]]; then
            note "$run is being run by another process (${NOTE[$run]}): left alone"
        elif [[ ${STATE[$run]} != 'done' ]]; then
            todo+=("$run")
            STATE[$run]=waiting
        fi
    done
    for slot in "${!SLOTS[@]}"; do PIDS[slot]=''; done
    while :; do
        [[ -n $STOP || -n $(start_time $$) ]] || stop TERM # guard_pool was killed: stop in order
        busy=0
        for slot in "${!SLOTS[@]}"; do
            [[ -z ${PIDS[slot]} ]] || kill -0 "${PIDS[slot]}" 2>/dev/null || end "$slot"
            while [[ -z ${PIDS[slot]} && ${#todo[@]} -gt 0 && -z $STOP ]]; do
                begin "${todo[0]}" "$slot"
                todo=("${todo[@]:1}")
            done
            [[ -z ${PIDS[slot]} ]] || busy=1
        done
        status_line
        ((busy)) || break
        if read -r -t 0.5 -u 8 signal; then stop "$signal"; fi
    done
    [[ ! -t 1 ]] || echo
    trap - EXIT
    list_failed
    printf '\n%s\n%s\n' "$OUT" "$(summary)"
    (($(count 'done') == ${#RUNS[@]}))
}

run_pool() { # the pool, and a word on how to go on
    local status=0
    pool || status=$?
    ((status)) || exit 0
    if [[ $STOP = USR1 && -n $TASK ]]; then # the warning before the time limit: queue this task again
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" || note "not requeued; submit again to carry on"
    fi
    [[ -n $STOP ]] || exit 1
    note "stopped by SIG$STOP; the same call again carries on"
    exit $((128 + $(kill -l "$STOP")))
}

guard_pool() { # run_pool in a process of its own, which ignores signals; here they are heard and passed on by a pipe
    # Ctrl-C strikes the whole process group in the foreground, and SLURM all processes of a task. In the midst of its
    # many small commands the pool could neither tell which of them was struck nor run a trap: bash 5.2 then sometimes
    # dies of a syntax error. This process does nothing but wait. And the runs are asked to stop once, by the pool.
    local signal folder status=0 again
    folder=$(mktemp -d)
    mkfifo "$folder/signals"
    exec 8<>"$folder/signals"
    rm -r "$folder"
    # shellcheck disable=SC2064 # the signal of now
    for signal in "${SIGNALS[@]}"; do trap "echo $signal >&8" "$signal"; done
    set -m # a process group of its own, which no Ctrl-C reaches
    run_pool &
    set +m
    while kill -0 $! 2>/dev/null; do wait $! 2>/dev/null || status=$?; done # a signal ends a wait
    wait $! 2>/dev/null && again=0 || again=$?
    exit $((again == 127 ? status : again)) # 127: the last wait in the loop had its status already
}

# ----------------------------------------------------------------------------------------------------------------------
# SLURM: one job array of what is missing
# ----------------------------------------------------------------------------------------------------------------------

make_tasks() { # TASKS: a line of runs each; SBATCH: the command, but for the name
    local per_task=1 gpus=${GPUS:-1} run line='' n=0
    if [[ -n $SHARDS ]]; then
        SBATCH=("--gres=shard:$SHARDS")
    elif [[ ${gpus##*:} = 0 ]]; then
        per_task=${JOBS:-1}
        SBATCH=()
    else
        per_task=$((${gpus##*:} * ${RUNS_PER_GPU:-1}))
        SBATCH=("--gres=gpu:$gpus")
    fi
    TASKS=()
    for run in "${RUNS[@]}"; do
        [[ ${STATE[$run]} =~ ^(failed|stopped|waiting)$ && -z ${QUEUE[$run]-} ]] || continue
        line+="${line:+ }$run"
        n=$((n + 1))
        ((n % per_task)) || { TASKS+=("$line") && line=''; }
    done
    [[ -z $line ]] || TASKS+=("$line")
    THREADS=${THREADS:-4} # not measured: a run on a GPU plays and launches kernels with one or two threads
    SBATCH=(sbatch --parsable "--array=0-$((${#TASKS[@]} - 1))${MAX_TASKS:+%$MAX_TASKS}" --nodes=1 --ntasks=1
        "--cpus-per-task=$((THREADS * per_task))" "${SBATCH[@]}" --requeue "--signal=B:USR1@${GRACE:-120}"
        # A requeued task writes on after its first try.
        --open-mode=append ${PARTITION:+"--partition=$PARTITION"} ${ACCOUNT:+"--account=$ACCOUNT"}
        ${TIME:+"--time=$TIME"} ${MEM:+"--mem=$MEM"} "${SLURM_ARGS[@]}")
    TASK_COMMAND=("$HERE/benchmark.sh" --out "$OUT" --script "$SCRIPT" --preset "$PRESET" --python "$PYTHON"
        --threads "$THREADS")
    [[ ${gpus##*:} != 0 || -n $SHARDS ]] || TASK_COMMAND+=(--jobs "${JOBS:-1}")
    [[ -z $RUNS_PER_GPU ]] || TASK_COMMAND+=(--runs-per-gpu "$RUNS_PER_GPU")
}

submit() {
    local name folder job
    name=$NAME-$(date +%Y%m%d-%H%M%S)-$$ folder=$OUT/slurm/$name
    mkdir -p "$folder"
    printf '%s\n' "${TASKS[@]}" >"$folder/tasks.txt"
    {
        echo '#!/usr/bin/env bash'
        # exec: the warning goes to the process of the batch script, which must be the one that heeds it.
        printf 'exec bash'
        printf ' %q' "${TASK_COMMAND[@]}" --task "$folder/tasks.txt" -- "${EXTRA[@]}"
        echo
    } >"$folder/job.sh"
    # sbatch gives % a meaning in file names.
    if ! job=$("${SBATCH[@]}" --job-name="$name" --output="${folder//%/%%}/task%a.txt" "$folder/job.sh"); then
        rm -r "$folder"
        fail "sbatch refused the job array; nothing was submitted"
    fi
    echo "submitted job array ${job%%;*}: ${#TASKS[@]} tasks, named $name; the runs are shown by:" \
        "$(printf '%q ' "$HERE/benchmark.sh" --out "$OUT" --status)"
}

read_task() { # RUNS of this task of the job array
    read -ra RUNS < <(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$TASK") || fail "$TASK has no task $SLURM_ARRAY_TASK_ID"
    echo "=== $(date '+%F %T') $HOST, job ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID," \
        "restart ${SLURM_RESTART_COUNT:-0}, GPUs ${CUDA_VISIBLE_DEVICES-none}: ${RUNS[*]}"
}

# ----------------------------------------------------------------------------------------------------------------------

dry_run() {
    local run slot=0 missing=0 seconds share=1 unit='GPU-hours' source="the mean of the finished runs"
    for run in "${RUNS[@]}"; do
        if [[ ! ${STATE[$run]} =~ ^(failed|stopped|waiting)$ || -n ${QUEUE[$run]-} ]]; then
            echo "# $run: ${STATE[$run]}"
            continue
        fi
        missing=$((missing + 1))
        [[ -z $SLURM ]] || continue
        make_command "$run" $((slot % ${#SLOTS[@]}))
        slot=$((slot + 1))
        printf '%q ' "${COMMAND[@]}" && echo
    done
    if [[ -n $SLURM ]]; then
        ((missing == 0)) || printf '%q ' "${SBATCH[@]}" "$OUT/slurm/$NAME-.../job.sh" && echo
        printf '%s\n' "${TASKS[@]}" | awk 'NF {print "task " NR - 1 ": " $0}'
        [[ ${GPUS##*:} != 0 ]] || unit='run-hours'
        share=${RUNS_PER_GPU:-1}
    elif ((${#DEVICES[@]})); then
        share=${RUNS_PER_GPU:-1}
        echo "${#SLOTS[@]} at once, $share on each of ${#DEVICES[@]} GPUs, $THREADS CPU threads each"
    else
        unit='run-hours'
        echo "${#SLOTS[@]} at once on the CPU, $THREADS threads each"
    fi
    echo "$missing of ${#RUNS[@]} runs to do, in $OUT"
    seconds=$(seconds_per_run)
    [[ -z $HOURS ]] || source=--hours-per-run
    if [[ -n $seconds ]]; then
        awk -v n="$missing" -v s="$seconds" -v k="$share" -v u="$unit" 'BEGIN {printf "%s: %.1f", u, n * s / 3600 / k}'
        echo " ($missing runs of $(clock "$seconds") each, $source; $share at a time)"
    else
        echo "GPU-hours: not measured; give --hours-per-run H"
    fi
}

main() {
    local game seed
    parse "$@"
    read_games
    read_seeds
    check_options
    RUNS=()
    # All games with the first seed come before any with the second: half a benchmark still is one of all games.
    for seed in "${SEEDS[@]}"; do for game in "${GAMES[@]}"; do RUNS+=("$game/seed$seed"); done; done
    if [[ -n $STATUS ]]; then
        show_status || exit 1
        exit 0
    fi
    [[ -n $SLURM ]] || find_devices
    if [[ -n $TASK ]]; then
        read_task
    else
        check_arguments
        [[ -n $DRY ]] || make_out
        if ! read_queue; then
            [[ -z $SLURM || -n $DRY ]] || fail "SLURM's squeue does not answer; nothing was submitted"
            note "SLURM's squeue does not answer: what is queued is not known"
        fi
    fi
    read_states
    if [[ -n $SLURM ]]; then
        command -v sbatch >/dev/null || [[ -n $DRY ]] || fail "there is no sbatch here; log in to the cluster"
        make_tasks
        if [[ -n $DRY ]]; then
            dry_run
        elif ((${#TASKS[@]})); then
            submit
        else
            echo "nothing to submit: $(summary)"
        fi
        exit 0
    fi
    find_threads
    if [[ -n $DRY ]]; then
        dry_run
        exit 0
    fi
    guard_pool
}

main "$@"
