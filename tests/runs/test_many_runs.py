"""Many runs: the same command twice, impatient signals, and a real SLURM of two nodes on this machine."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_run, command, environment, tiny

from common.errors import UserError
from common.recurrence import engine_for
from common.runs import machine, records
from common.runs.provenance import published_code
from common.stair import FixedStair, Nonlinearity

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and schedulers of POSIX")

# Some seconds of updates, a checkpoint at the first report; the end is the same wherever the run was stopped.
LONG = ("--nhid", "8", "--T", "10", "--c-length", "3", "--batch", "4", "--log-interval", "20", "--threads", "1",
        "--no-curves")
AUTO = ("--resume", "auto")


def wait_for(something, what: str, seconds: float = 120):
    """→ what `something()` gives as soon as it is true."""
    limit = time.monotonic() + seconds
    while not (found := something()):
        assert time.monotonic() < limit, f"no {what} after {seconds} s"
        time.sleep(0.05)
    return found


def started(*arguments, cwd) -> subprocess.Popen:
    return subprocess.Popen(command("copytask_nvar", *LONG, *arguments), cwd=cwd, env=environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process) -> tuple[int, str]:
    said = "".join(process.communicate(timeout=120))
    return process.returncode, said


def folders(saves) -> list[Path]:
    return sorted(Path(saves, "copytask_nvar").glob("*"))


def test_the_same_command_twice_at_once_makes_one_folder(tmp_path):
    pair = [started(*AUTO, "--updates", "400", cwd=tmp_path) for _ in range(2)]
    ends = sorted(map(finished, pair))
    folder, = folders(tmp_path / "saves")
    assert ends[0][0] == 0
    assert ends[1][0] == 0 or "another process is working on" in ends[1][1]
    assert len(records.log_rows(folder)) == 20


def test_auto_starts_goes_on_and_says_that_a_run_is_finished(main, tmp_path, capsys):
    first = started(*AUTO, "--updates", "20000", cwd=tmp_path)
    folder, = wait_for(lambda: [path.parent for path in tmp_path.glob("saves/*/*/last.pt")], "checkpoint")
    place = f"saves/copytask_nvar/{folder.name}"
    with pytest.raises(UserError, match=f"another process is working on {place}; wait for it or stop it first"):
        main("copytask_nvar", *LONG, *AUTO, "--updates", "20000")
    first.terminate()
    assert finished(first)[0] == 128 + signal.SIGTERM
    main("copytask_nvar", *LONG, *AUTO, "--updates", "40")                             # other science, another run
    assert f"writing to {place}-2" in capsys.readouterr().out
    main("copytask_nvar", *LONG, *AUTO, "--updates", "40")
    said = capsys.readouterr().out
    assert f"going on with {place}-2" in said
    assert "this run is finished" in said
    assert len(folders(tmp_path / "saves")) == 2


def test_auto_leaves_a_run_that_diverged(main, tmp_path):
    wild = (*LONG, *AUTO, "--optimizer", "RMSprop", "--lr", "1e30", "--lr_orth", "1e30", "--updates", "400")
    with pytest.raises(UserError) as diverged:
        main("copytask_nvar", *wild)
    assert diverged.value.status == 3
    folder, = folders(tmp_path / "saves")
    before = (folder / "log.csv").read_bytes()
    with pytest.raises(UserError, match="ended in a loss that is not finite, and would again") as refused:
        main("copytask_nvar", *wild)
    assert refused.value.status == 3
    assert (folder / "log.csv").read_bytes() == before


def test_another_version_is_said_in_a_line(main, tmp_path, capsys):
    main("copytask_nvar", *LONG, *AUTO, "--updates", "20")
    folder, = folders(tmp_path / "saves")
    config = records.read_config(folder)
    config["versions"]["torch"], config["code"]["common/stair.py"] = "1.0", published_code()["common/stair.py"][0]
    records.write_json(folder / "config.json", config)
    capsys.readouterr()
    main("copytask_nvar", *LONG, *AUTO, "--updates", "20")
    said = "".join(capsys.readouterr())
    assert "this run is finished" in said
    assert f"not as it was started: torch 1.0 → {torch.__version__}, common/stair.py; the numbers may differ" in said
    assert len(folders(tmp_path / "saves")) == 1


def test_an_engine_that_cannot_run_leaves_no_folder(main, tmp_path):
    with pytest.raises(UserError, match="triton"):
        main("copytask_nvar", *LONG, "--engine", "triton", "--updates", "20")
    assert not (tmp_path / "saves").exists()


@pytest.mark.parametrize("script", ["copytask_nvar", "language_alpha"])
def test_the_result_names_the_engine_and_its_threads(main, data_folder, script, monkeypatch):
    fastest = engine_for(torch.zeros(1, 1, 1), FixedStair("n", 1), Nonlinearity("modrelu", 1))
    for engine, ran in (("torch", "torch"), ("auto", fastest)):
        _, folder = main(script, *tiny(script), *data_folder(script), "--engine", engine, "--name", engine)
        result = records.read_result(folder)
        assert result["engine"] == ran
        assert result["threads"] == 1


def test_a_second_signal_does_not_undo_the_first(tmp_path):
    process = started("--updates", "1000000", cwd=tmp_path)
    folder, = wait_for(lambda: [path.parent for path in tmp_path.glob("saves/*/*/last.pt")], "checkpoint")
    before = (folder / "last.pt").read_bytes()
    while process.poll() is None:                              # to its very end, which may be the signal's own
        process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    assert finished(process)[0] in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert (folder / "last.pt").read_bytes() != before


@pytest.mark.parametrize(("groups", "files", "cores"), [
    ("0::/\n", {"cpu.max": "max 100000"}, float("inf")),
    ("0::/\n", {"cpu.max": "200000 100000"}, 2),
    ("0::/job/step\n", {"job/cpu.max": "350000 100000", "job/step/cpu.max": "max 100000"}, 3),
    ("0::/job/step\n", {"job/cpu.max": "350000 100000", "job/step/cpu.max": "50000 100000"}, 1),
    ("3:cpu,cpuacct:/job\n0::/\n", {"cpu/job/cpu.cfs_quota_us": "400000", "cpu/job/cpu.cfs_period_us": "100000"}, 4),
    ("3:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, float("inf")),
    ("", {}, float("inf")),
    ("nonsense\n", {"cpu.max": "?"}, float("inf")),
])
def test_the_quota_of_a_container(tmp_path, groups, files, cores):
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert machine.cores_of_quota(tmp_path / "groups", tmp_path / "root") == cores


def test_the_default_of_threads(monkeypatch):
    monkeypatch.setattr(machine, "cores_of_quota", lambda: 3)
    for variable, typed, threads in ((None, None, 3), ("7", None, 5), (None, 2, 2)):
        torch.set_num_threads(5)                               # as torch starts, by OMP_NUM_THREADS or the cores
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if variable:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        machine.prepare_machine(False, typed)
        assert torch.get_num_threads() == threads


CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000
PartitionName=all Nodes=one,two Default=YES MaxTime=INFINITE State=UP
"""
NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "munged")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture
def slurm(tmp_path_factory):
    """A controller and two nodes on loopback → slurm(*command) runs one of SLURM's commands, and gives its output."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    folder.chmod(0o755)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, ports=free_ports(3),
                                                            host=socket.gethostname().partition(".")[0]))
    told = {**environment(), "SLURM_CONF": str(folder / "slurm.conf")}

    def run(*words, check=True):
        done = subprocess.run(words, env=told, cwd=folder, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0 or not check, f"{words}: {done.stderr}"
        return done.stdout

    daemons = []

    def daemon(*words):
        daemons.append(subprocess.Popen(words, env=told, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                        start_new_session=True, text=True))

    try:
        daemon("munged", "--foreground", "--force", f"--key-file={folder}/key", f"--socket={folder}/munge",
               f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed")
        wait_for((folder / "munge").exists, "munge")
        daemon("slurmctld", "-D")
        for node in ("one", "two"):
            daemon("slurmd", "-D", "-N", node)
        wait_for(lambda: run("sinfo", "-h", "-o", "%T %D", check=False).strip() == "idle 2", "idle nodes", 30)
        run.environment = told
        yield run
    finally:
        for environ in Path("/proc").glob("[0-9]*/environ"):    # the daemons, and what they have started
            with contextlib.suppress(OSError):
                if f"SLURM_CONF={folder}/".encode() in environ.read_bytes():
                    os.kill(int(environ.parent.name), signal.SIGKILL)
        for process in daemons:
            process.communicate(timeout=30)


@pytest.mark.slurm
@pytest.mark.skipif(any(shutil.which(name) is None for name in NEEDED), reason="SLURM (slurmctld ...) is not installed")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="the daemons of SLURM need root")
def test_an_array_of_runs_is_requeued_and_ends_as_if_nothing_had_happened(slurm, tmp_path):
    """Tasks 1 and 2 are stopped on their way, 1 by its time limit's signal, 2 by a preemption; 3 is left alone.

    Task 4 is cancelled and stays so.
    """
    saves, runs = tmp_path / "saves", ((400, 3000), (401, 3000), (402, 40), (403, 1_000_000))
    (tmp_path / "list.txt").write_text("".join(
        shlex.join(command("copytask_nvar", *LONG, *AUTO, "--updates", updates, "--seed", seed, "--save", saves)) + "\n"
        for seed, updates in runs))
    job = slurm("sbatch", "--parsable", "--mem=100", f"--chdir={tmp_path}", "--array=1-4",
                str(ROOT / "evidence" / "slurm.sbatch"), str(tmp_path / "list.txt")).strip()

    def state(task):
        return slurm("squeue", "-h", "-t", "all", "-j", f"{job}_{task}", "-o", "%T", check=False).strip()

    def folder_of(task):
        return saves / "copytask_nvar" / f"expRNN-expn-s{399 + task}"

    def saved(task):
        return (folder_of(task) / "last.pt").exists()

    def start_again(task):
        wait_for(lambda: state(task) == "PENDING", f"requeued task {task}")
        slurm("scontrol", "update", f"jobid={job}_{task}", "StartTime=now")

    wait_for(lambda: saved(2), "second run")
    slurm("scontrol", "requeue", f"{job}_2")
    wait_for(lambda: saved(1), "first run")
    subprocess.Popen(["timeout", "3", "scancel", "--signal=TERM", f"{job}_1"], env=slurm.environment).wait()
    wait_for(lambda: saved(4), "last run")
    slurm("scancel", f"{job}_4")
    start_again(1)
    start_again(2)
    whole = [started(*AUTO, "--updates", updates, "--seed", seed, "--save", tmp_path / "whole", cwd=tmp_path)
             for seed, updates in runs[:2]]
    for task in (1, 2, 3):
        wait_for(lambda task=task: state(task) == "COMPLETED", f"end of task {task}")
    assert [finished(process)[0] for process in whole] == [0, 0]
    for task, uninterrupted in zip((1, 2), folders(tmp_path / "whole"), strict=True):
        assert "going on with" in (tmp_path / f"{job}_{task}.txt").read_text()
        assert_same_run(folder_of(task), uninterrupted)
    assert "stopped and saved" in (tmp_path / f"{job}_1.txt").read_text()
    assert records.read_result(folder_of(3))["updates"] == 40
    assert state(4) == "CANCELLED"
    assert (folder_of(4) / "last.pt").exists()
    assert not (folder_of(4) / "result.json").exists()
    assert len(folders(saves)) == 4
