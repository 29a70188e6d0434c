#!/usr/bin/env bash
# A real Slurm of one node on loopback, for tests: munged, slurmctld and slurmd, with all that they write in one folder.
#
#   slurm_cluster.sh start FOLDER    and then: export SLURM_CONF=FOLDER/slurm.conf
#   slurm_cluster.sh stop FOLDER
#
# Needs root and Debian's packages: apt-get install -y --no-install-recommends slurm-wlm munge
set -euo pipefail
action=$1
folder=$(realpath -m "$2")
export SLURM_CONF="$folder/slurm.conf"

started() { [ -s "$folder/$1.pid" ] && kill -0 "$(cat "$folder/$1.pid")" 2>/dev/null; }

start() {
    mkdir -p "$folder"/{state,spool}
    chmod 700 "$folder"
    (umask 077 && dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 status=none)
    # cred_expire: a job that is requeued waits for as long as a credential lives, two minutes by default
    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmctldPort=${SLURM_TEST_PORT:-36817}
SlurmdPort=$((${SLURM_TEST_PORT:-36817} + 1))
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MaxArraySize=2
KillWait=5
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes=localhost Default=YES MaxTime=60 State=UP
CONF
    # --force: the folder need not be the munge user's
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" 2>"$folder/munged.err"
    slurmctld
    slurmd -N localhost
    for _ in $(seq 120); do
        if [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ]; then
            return
        fi
        sleep 0.5
    done
    echo "the node did not come up; see the logs in $folder" >&2
    tail -n 5 "$folder"/*.log >&2
    exit 1
}

stop() {
    for name in slurmd slurmctld munged; do
        if started "$name"; then
            kill "$(cat "$folder/$name.pid")"
        fi
    done
    for _ in $(seq 40); do
        if ! started slurmd && ! started slurmctld && ! started munged; then
            return
        fi
        sleep 0.25
    done
}

"$action"
