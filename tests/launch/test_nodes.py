"""`launch node`, `hosts` and `slurm`: stored text, refusals, and real processes behind an ssh and an sbatch that run here."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import launch.__main__ as program
from launch import hosts, processes, slurm
from launch import nodes as ssh_nodes
from launch import rank_logs as output
from launch.job import Command, Job, LaunchError, Node, Nodes, launcher
from tests.conftest import environment, free_port, wait_for
from tests.support import fake_trainer
from tests.support.fake_trainer import launched, read

folder = fake_trainer.folder  # the fixture
RENDERED = Path(__file__).parent / "rendered"
JOB = Job("configs/quickstart.yaml", ("optim.lr=1e-3", "name=a b"))
ENV = {
    "PATH": "/bin", "MLFLOW_TRACKING_URI": "http://t:5000", "MLFLOW_TRACKING_PASSWORD": "secret", "PYTHONPATH": "/my code",
    "PET_VIRTUAL_LOCAL_RANK": "1", "TORCHINDUCTOR_CACHE_DIR": "~/my graphs", "TRITON_CACHE_DIR": "/scratch/triton",
}  # fmt: skip
SCRIPTS = {
    "slurm_gpus": slurm.SlurmRequest(
        nodes=Nodes(4, 4), processes=8, gpus=8, cpus=12, time="1-00:00:00", account="vision", partition="gpu", qos="long",
        constraint="h200", modules=("cuda/13.0",),
        setup=("source /env/bin/activate", "export NCCL_DEBUG=WARN"), extra=("--exclusive", "--mem=0"),
    ),
    "slurm_cpu": slurm.SlurmRequest(nodes=Nodes(2, 2), processes=2, requeue=False),
    "slurm_apptainer": slurm.SlurmRequest(nodes=Nodes(1, 1), processes=4, gpus=4, time="60", container="/images/tri level.sif"),
    "slurm_elastic": slurm.SlurmRequest(nodes=Nodes(2, 8), processes=8, gpus=8, time="1-00:00:00"),
    "slurm_pyxis": slurm.SlurmRequest(nodes=Nodes(2, 2), processes=4, gpus=4, container="registry#trilevel:1", runtime="pyxis"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_rendered_scripts_equal_the_stored_text_and_are_shell(name):
    text = slurm.render(JOB, SCRIPTS[name], "/env/bin/python", "runs/a b")
    assert text == (RENDERED / f"{name}.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.parametrize("time", ["0", "0:00", "0-0", "6:01", "0:06:01"])
def test_a_limit_that_leaves_time_to_save_and_none_at_all_are_accepted(time):
    """Slurm reads 0 as no limit; --signal 300 comes up to 60 s early, so 361 s are the first that leave a second of training."""
    text = slurm.render(JOB, slurm.SlurmRequest(Nodes(1, 1), 1, time=time), "python", "runs/x")
    assert f"#SBATCH --time={time}\n" in text and "#SBATCH --signal=USR1@300\n" in text


def test_rendered_ssh_equals_the_stored_text():
    found = hosts.read("# the cluster\nme@node1 slots=4  # with a disk\n\nnode2 slots=4\n")
    commands = hosts.render(
        JOB, found, Nodes(2, 2), hosts.processes_of(found, None), 29400, "/env/bin/python", Path("/shared/my runs"), ENV
    )
    text = "\n".join(command.text() for command in commands) + "\n"
    assert text == (RENDERED / "hosts.txt").read_text()
    assert "secret" not in text


def test_an_elastic_job_resumes_and_meets_by_torchruns_agent():
    from torch.distributed.run import get_args_parser

    node = Node(8, True, 29400, "node1", nodes=4, number=1, least=2, own_address="node2")
    words = list(launcher(JOB, node, "python").argv)
    read = get_args_parser().parse_args(words[3:])
    assert (read.nnodes, read.nproc_per_node, read.rdzv_backend, read.rdzv_endpoint) == ("2:4", "8", "c10d", "node1:29400")
    assert read.local_addr == "node2" and "is_host=0" in read.rdzv_conf and read.module and read.training_script == "trainer"
    assert tuple(read.training_script_args) == replace(JOB, resume=True).train()
    found, nodes = hosts.chosen(hosts.read("a slots=1\nb slots=1\nc slots=1"), "1:2")
    commands = hosts.render(JOB, found, nodes, 1, 29400, "python", Path("/"), {}, ssh_config="my config")
    assert len(commands) == 2 and "--nodes 1:2" in commands[1].text() and "--here b" in commands[1].text()
    assert commands[0].argv[-4:-2] == ("-F", "my config")
    with pytest.raises(LaunchError, match=r"--nodes 1:4: the hostfile has 3"):
        hosts.chosen(hosts.read("a\nb\nc"), "1:4")


# A launcher and its rank, which ends on a signal and leaves its exit code; the launcher stays a while, as torchrun's does.
RANK_OF_LAUNCHER = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit())
if sys.argv[1] == "75":
    pathlib.Path(os.environ["TRILEVEL_EXIT_FILE"]).write_text("75")
pathlib.Path("up").write_text(str(os.getpid()))
time.sleep(60)
"""
LAUNCHER = "import subprocess, sys, time; subprocess.run([sys.executable, *sys.argv[1:]]); time.sleep(60)"


@pytest.mark.parametrize("code", [75, 0])
def test_the_end_of_slurms_step_makes_no_failure_of_a_node_that_has_saved(code, tmp_path, monkeypatch):
    """One node's end makes srun end the step: SIGTERM to all that still runs on the others, whose ranks have ended by then."""
    monkeypatch.chdir(tmp_path)

    def slurm_signals() -> None:
        wait_for((tmp_path / "up").exists, 60)
        wait_for(lambda: (tmp_path / "up").read_text(), 60)
        rank = psutil.Process(int((tmp_path / "up").read_text()))
        above = rank.parent()
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: not rank.is_running(), 60)
        os.kill(os.getpid(), signal.SIGTERM)
        above.terminate()

    thread = threading.Thread(target=slurm_signals)
    thread.start()
    words = (sys.executable, "-c", LAUNCHER, "-c", RANK_OF_LAUNCHER, str(code), "trainer")
    assert processes.start(Command(words)) == code
    thread.join()


LAST = """
import os, signal, sys
from launch.job import Command
from launch.processes import start
code = start(Command((sys.executable, "-c", "raise SystemExit(75)")), last=True)
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(code)
"""


def test_a_signal_after_the_end_of_a_node_does_not_change_its_exit_code(tmp_path):
    """srun's SIGTERM reached a node between the end of its ranks and its own: 143, and the job was not requeued."""
    done = subprocess.run([sys.executable, "-c", LAST], cwd=tmp_path, env=environment(), timeout=120)
    assert done.returncode == 75


@pytest.mark.parametrize(
    ("spare", "code", "took"), [(0, 3, "stopping the other nodes"), (1, 0, "the other nodes continue without it")]
)
def test_a_lost_node_ends_the_job_or_not_as_it_may(spare, code, took, tmp_path, capsys):
    """Two commands in place of ssh: one fails; the other ends well when a Ctrl-C arrives, or when none does."""
    waits = "import sys, select; print('fed' if select.select([sys.stdin], [], [], {})[0] else 'alone')"
    ends = Command((sys.executable, "-c", "import sys; sys.exit(3)"))
    stays = Command((sys.executable, "-c", waits.format(3 if spare else 60)))
    assert ssh_nodes.run_on_hosts([ends, stays], ["a", "b"], tmp_path, spare) == code
    message = capsys.readouterr()
    assert f"a ended with 3; {took}" in message.err
    assert ("alone" if spare else "fed") in (tmp_path / "b.txt").read_text()


def test_ranks_that_handle_no_signal_are_killed_before_their_ssh_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that waits in a collective outlives its ssh: the node's launcher kills it at the third Ctrl-C."""
    monkeypatch.setattr(ssh_nodes, "PATIENCE", 0.5)
    wait = "import sys; n = 0\nwhile n < 4: n += sys.stdin.buffer.read(1) == b'\\x03'; open('got', 'w').write(str(n))"
    stuck = Command((sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {wait}"))
    fails = Command(("sh", "-c", "sleep 1; exit 9"))
    assert ssh_nodes.run_on_hosts([fails, stuck], ["a", "b"], tmp_path) == 9
    assert (tmp_path / "got").read_text() == "4", "one when the other node failed, three after PATIENCE"


def test_a_node_that_still_runs_after_another_has_ended_well_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A frozen host never fails, and its ssh waited without limit."""
    monkeypatch.setattr(ssh_nodes, "LEFT", 0.5)
    monkeypatch.setattr(ssh_nodes, "LINGER", 0.5)
    frozen = Command((sys.executable, "-c", "import time; time.sleep(60)"))
    began = time.monotonic()
    assert ssh_nodes.run_on_hosts([Command(("true",)), frozen], ["a", "b"], tmp_path) == 128 + signal.SIGKILL
    assert time.monotonic() - began < 20
    assert capsys.readouterr().err.startswith("launch: killed on b, which still ran after another node had ended")


@pytest.mark.parametrize("least", [None, 1])
def test_torchrun_marks_the_lines_of_each_rank(least):
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.elastic.multiprocessing import Std
    from torch.distributed.run import get_args_parser

    command = launcher(JOB, Node(2, False, 29400, "node1", nodes=2, threads=1, least=least, tee="/tmp/a b"), "python")
    words = list(command.argv)
    read = (get_args_parser() if least else launch_command_parser()).parse_args(words[3:])
    assert (Std.from_str(read.tee), read.log_dir, read.training_script) == (Std.ALL, "/tmp/a b", "trainer")
    assert command.env["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] == "\x1e[rank ${rank}] "
    alone = launcher(JOB, Node(1, False, 29400, tee="/tmp/a b"), "python")  # no torchrun, so no marked ranks
    assert "--tee" not in alone.argv and not any("PREFIX" in name for name in alone.env)


@pytest.mark.parametrize("broken", ["terminal", "disk"])
def test_a_closed_terminal_or_a_full_disk_does_not_stop_the_reading(broken, tmp_path, monkeypatch, capsysbinary):
    """Who stops reading a pipe stops the job behind it."""

    def gone(line: bytes) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    if broken == "terminal":
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=SimpleNamespace(write=gone)))
    else:
        for name in ("node1", "rank-7"):
            (tmp_path / f"{name}.txt").symlink_to("/dev/full")
    message = [b"starts\n", b"[rank 7] caf\xe9\n", b"[rank 7] more\r\n"]
    output.copy_node(io.BytesIO(b"".join(message)), "node1", tmp_path)
    output.copy_ranks(io.BytesIO(b"".join(message).replace(b"[rank", b"\x1e[rank")), tmp_path)
    if broken == "terminal":
        rows = (tmp_path / "node1.txt").read_bytes().splitlines()
        assert rows[0].startswith(b"-- 20") and rows[1:] == [b"starts", b"[rank 7] caf\xe9", b"[rank 7] more"]
        assert (tmp_path / "rank-7.txt").read_bytes().splitlines()[1:] == [b"caf\xe9", b"more"]
    else:
        assert capsysbinary.readouterr().out == b"".join(b"[node1] " + line.replace(b"\r", b"") for line in message) + b"".join(
            message
        )


def test_a_ctrl_c_before_all_nodes_are_started_leaves_none_behind(tmp_path, monkeypatch):
    started: list[subprocess.Popen[bytes]] = []

    def popen(*words, **more) -> subprocess.Popen[bytes]:
        started.append(made := real(*words, **more))
        os.kill(os.getpid(), signal.SIGINT)
        return made

    real = subprocess.Popen
    monkeypatch.setattr(processes.subprocess, "Popen", popen)
    waits = Command((sys.executable, "-c", "import time; time.sleep(60)"))
    assert ssh_nodes.run_on_hosts([waits] * 3, ["a", "b", "c"], tmp_path) == 128 + signal.SIGINT
    assert len(started) == 1 and started[0].poll() is not None


def test_the_output_of_a_requeued_job_is_appended(tmp_path):
    for word in (b"first", b"second"):
        output.copy_ranks(io.BytesIO(b"\x1e[rank 0] " + word + b"\n"), tmp_path)
    assert (tmp_path / "rank-0.txt").read_text().splitlines()[1::2] == ["first", "second"]


# the second: the node of rank 0 ends with 75, and srun ends a slower node with 143, the highest code
@pytest.mark.parametrize("srun", ["return 75;", 'SLURM_NODEID=0 bash -c "${@: -1}"; return 143;'])
def test_a_stopped_job_is_requeued_under_set_e_and_where_srun_ended_a_slower_node(srun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script(tmp_path / "python", "#!/bin/sh\nexit 75\n")
    stands_in = ("set -eu", "SLURM_JOB_ID=7 SLURM_JOB_NODELIST=a", f"srun() {{ {srun} }}", 'scontrol() { echo "$@"; }')
    text = slurm.render(JOB, slurm.SlurmRequest(Nodes(1, 1), 1, setup=stands_in), f"{tmp_path}/python", "runs/a b")
    ended = subprocess.run(["bash"], input=text, capture_output=True, text=True, check=False)
    requeued = "launch: attempt 1 ended with 75, newest checkpoint: none, 1 of 3 ends there; requeued\nrequeue 7\n"
    assert (ended.returncode, ended.stdout) == (75, requeued), ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ends-7", "python"]


def test_a_port_in_use_on_the_node_of_the_rendezvous_is_not_taken():
    """Every attempt of a job has the same number, so the same port."""
    text = slurm.render(JOB, SCRIPTS["slurm_cpu"], "python", "runs/x")
    begin, chosen = text.index("port="), text.index("export address port")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        line = text[begin:chosen].replace("20000 + SLURM_JOB_ID % 10000", str(taken))
        done = subprocess.run(["bash", "-euc", f"{line}echo $port"], capture_output=True, text=True, check=True)
    assert taken < int(done.stdout) < taken + 100 and done.stderr == ""


def test_an_empty_exit_file_of_a_full_disk_is_not_an_exit_code():
    writes = "import os, sys; open(os.environ['TRILEVEL_EXIT_FILE'], 'w'); sys.exit(1)"
    assert processes.start(Command((sys.executable, "-c", writes))) == 1


def test_hosts_without_ssh_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(program, "start", lambda command: pytest.fail("started"))
    assert program.main(["hosts", "c.yaml", "--hostfile", str(tmp_path / "hosts")]) == 2
    assert "ssh not found" in capsys.readouterr().err


def test_half_lines_of_ranks_stay_apart(tmp_path, capsysbinary):
    """torchrun passes on an unfinished line (a progress bar, a print without an end), and another rank's output follows on its line."""
    message = b"W torch\x1e[rank 0] par\x1e[rank 11] [rank 0] fake\n\x1e[rank 0] tial\n\x1e[rank 11] no end"
    output.copy_ranks(io.BytesIO(message), tmp_path)
    kept = [(tmp_path / f"rank-{rank}.txt").read_text().partition("\n")[2] for rank in (0, 11)]
    assert kept == ["partial\n", "[rank 0] fake\nno end"]
    shown = capsysbinary.readouterr().out.decode().splitlines()
    assert shown == ["W torch", "[rank 0] par", "[rank 11] [rank 0] fake", "[rank 0] tial", "[rank 11] no end"]


def test_a_folder_of_output_that_can_not_be_made_is_refused(tmp_path):
    (tmp_path / "logs").touch()
    with pytest.raises(LaunchError, match=r"--logs logs: cannot create .*; name another folder"):
        output.ensure_folder(tmp_path / "logs" / "run", "--logs logs")


def test_credentials_in_an_address_stay_here():
    env = {"MLFLOW_TRACKING_URI": "http://me:secret@t:5000"}
    (command,) = hosts.render(JOB, hosts.read("node1"), Nodes(1, 1), 1, 29400, "python", Path("/"), env)
    assert "secret" not in command.text()


@pytest.mark.parametrize(
    ("text", "asked", "message"),
    [
        ("", None, ["no hosts"]),
        ("node1 slot=8", None, ["line 1", "'slot=8'", "slots=8"]),
        ("node1\nnode1", None, ["line 2", "node1 is listed twice"]),
        ("node1\nme@node1", None, ["line 2", "node1 is listed twice"]),
        ("-oProxyCommand=x", None, ["line 1", "not a host name"]),
        ("node1; reboot", None, ["line 1", "not a host name"]),
        ("-v", None, ["line 1", "not a host name"]),
        ("-v@node1", None, ["line 1", "not a host name"]),
        ("../node1", None, ["line 1", "not a host name"]),
        ("node1 slots=\u00b2", None, ["line 1", "slots=8"]),
        ("node1", -1, ["--processes -1", "at least 1"]),
        ("node1\nnode2", None, ["none", "--processes N"]),
        ("node1 slots=8\nnode2 slots=4", None, ["[4, 8]", "node2 slots=4"]),
        ("node1 slots=8\nnode2", 4, ["[4, 8]"]),
    ],
)
def test_hostfiles_that_are_refused(text, asked, message):
    with pytest.raises(LaunchError) as refused:
        hosts.processes_of(hosts.read(text), asked)
    for words in message:
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("slurm c.yaml --nodes 0", "--nodes 0"),
        ("slurm c.yaml --nodes 4:2", "--nodes 4:2: write a number from 1 on, or MIN:MAX"),
        ("slurm c.yaml --nodes 2:4 --no-requeue", "--nodes 2:4 with --no-requeue"),
        ("local c.yaml --nodes 2:4", "--nodes: unknown flag"),
        ("slurm c.yaml --gpus 4 --processes 2", "--gpus 4 with --processes 2"),
        ("slurm c.yaml --time 1day", "--time 1day"),
        ("slurm c.yaml --nodes nan", "--nodes nan: write a number"),
        ("slurm c.yaml --processes 0", "--processes 0: at least 1"),
        ("slurm c.yaml --gpus -2", "--gpus -2: per node, 0 or more"),
        ("slurm c.yaml --cpus 0", "--cpus 0: at least 1"),
        ("slurm c.yaml --signal 0", "--signal 0"),
        ("slurm c.yaml --time 6:00", "--time 6:00 with --signal 300"),
        ("slurm c.yaml --account a\tb", "--account 'a\\tb'"),
        ("hosts c.yaml --hostfile f --port 70000", "70000: not a port"),
        ("node c.yaml --nodes 1 --number 0 --address a --port nan", "nan: not a port"),
        ("slurm c.yaml --container x --runtime docker", "apptainer, pyxis"),
        ("slurm c.yaml --sbatch exclusive", "'exclusive'"),
        ("slurm c.yaml --acount x", "did you mean '--account'?"),
        ("hosts c.yaml --hostfile absent", "--hostfile absent: No such file"),
        ("hosts c.yaml", "--hostfile"),
        ("node c.yaml --nodes 2 --number 2 --address a --port 1", "nodes count from 0"),
    ],
)
def test_words_that_are_refused(words, message, capsys, monkeypatch):
    monkeypatch.setattr(program, "start", lambda command: pytest.fail("started"))
    assert program.main(words.split(" ")) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_of_a_node_prints_its_command(capsys, monkeypatch):
    monkeypatch.setattr(program, "start", lambda *_, **__: pytest.fail("started"))
    words = "node c.yaml --nodes 2 --number 1 --processes 2 --address a --port 29400 --dry-run x=1"
    assert program.main(words.split(" ")) == 0
    printed = capsys.readouterr().out
    assert "trainer train c.yaml x=1" in printed and "--machine_rank 1" in printed and "--main_process_port 29400" in printed


def script(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(body)
    path.chmod(0o755)


# An ssh that gives the command a terminal here, as -tt does: a Ctrl-C that is written to it becomes a signal.
SSH = f"""#!{sys.executable}
import os, pty, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[2:] if words[0] == "-o" else words[1:]
status = pty.spawn(["sh", "-c", words[1].replace("env ", "env HOST=" + words[0] + " ", 1)])
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.fixture
def over_ssh(folder: Path):
    script(folder / "bin" / "ssh", SSH)
    (folder / "hostfile").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")

    def run(*words: str, port: int | None = 0, place: Path = folder) -> subprocess.Popen[str]:
        chosen = () if port is None else ("--port", str(port or free_port()))
        words = ("--hostfile", "hostfile", *chosen, *words)
        return launched(place, *words, command="hosts", PATH=f"{folder / 'bin'}:{os.environ['PATH']}")

    return run


@pytest.mark.dist
def test_hosts_connect_have_marked_lines_and_end_by_a_signal_with_their_checkpoint(folder, over_ssh):
    process = over_ssh("wait=1")
    wait_for(lambda: (folder / "0.json").exists() and (folder / "1.json").exists(), 90)
    assert [read(folder / f"{rank}.json")["env"]["WORLD_SIZE"] for rank in (0, 1)] == ["2", "2"]
    assert read(folder / "check.json")["world"] == "2"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75, output
    assert [read(folder / f"{rank}.heard")["signals"] for rank in (0, 1)] == [[signal.SIGINT]] * 2


@pytest.mark.dist
@pytest.mark.slow
def test_a_host_that_fails_ends_the_others_and_is_named(folder, over_ssh):
    trainer = folder / "trainer" / "__main__.py"
    trainer.write_text(trainer.read_text().replace('sys.exit(3 if rank == "1" else 0)', 'rank == "1" and sys.exit("no disk")'))
    process = over_ssh("crash=1", "wait=1")
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1 and "localhost ended with 1" in output, output
    logs = folder / "logs" / "c"
    assert "[localhost] [rank 1] no disk" in output and "[rank 1] no disk" in (logs / "localhost.txt").read_text()
    assert (logs / "rank-1.txt").read_text().splitlines()[1:] == ["no disk"]
    assert "\r" not in (logs / "localhost.txt").read_text()


@pytest.mark.dist
@pytest.mark.slow
def test_two_jobs_on_the_same_hosts_at_once_do_not_meet_each_other(folder, over_ssh):
    places = [folder / "first job", folder / "it's second"]
    for place in places:
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns("* *"))
    jobs = [over_ssh("wait=1", f"name=of {place.name}", port=None, place=place) for place in places]
    for place in places:
        wait_for(lambda place=place: (place / "0.json").exists() and (place / "1.json").exists(), 90)
    for place, process in zip(places, jobs, strict=True):
        assert read(place / "1.json")["words"][:3] == ["train", "c.yaml", "wait=1"]
        process.send_signal(signal.SIGINT)
        message, _ = process.communicate(timeout=90)
        assert process.returncode == 75, message
        assert {path.name for path in place.glob("logs/*/*")} >= {"127.0.0.1.txt", "localhost.txt"}


def test_a_host_that_can_not_be_reached_ends_all(folder, over_ssh):
    script(folder / "bin" / "ssh", "#!/bin/sh\necho 'Permission denied (publickey).'; exit 255\n")
    process = over_ssh()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "127.0.0.1 is left out: exit code 255: Permission denied (publickey)." in output
    assert "launch: at least 2 usable host(s) needed" in output and "--no-health" in output
    process = over_ssh("--no-health")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 255 and "[127.0.0.1] Permission denied" in output


# An sbatch that runs the script here on two "nodes", with what Slurm would set; scontrol and srun as far as the script uses them.
SBATCH = """#!/bin/sh
cat > script.sh
export SLURM_JOB_ID=4242 SLURM_JOB_NODELIST='node[1-2]'
exec bash script.sh
"""
SCONTROL = """#!/bin/sh
case "$1" in
  show) echo 127.0.0.1; echo 127.0.0.2;;
  requeue) echo "$2" > requeued;;
esac
"""
SRUN = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $second; b=$?; wait $first; a=$?
exit $((a > b ? a : b))
"""


@pytest.mark.dist
def test_a_batch_job_meets_and_goes_back_into_the_queue_when_it_was_stopped(folder):
    for name, body in {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": SRUN}.items():
        script(folder / "bin" / name, body)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    process = launched(
        folder, "wait=1", "--nodes", "2", "--sbatch=--exclusive", "--output=of jobs/%j.txt", command="slurm", PATH=path
    )
    wait_for(lambda: (folder / "0.json").exists() and (folder / "1.json").exists(), 90)
    ranks = [read(folder / f"{rank}.json") for rank in (0, 1)]
    assert all(r["words"] == ["train", "c.yaml", "wait=1", "--resume"] and r["env"]["WORLD_SIZE"] == "2" for r in ranks)
    # as slurmstepd does before the limit: SIGUSR1 to every process of the step, launchers too
    for child in psutil.Process(process.pid).children(recursive=True):
        if any(word in child.cmdline() for word in ("node", "accelerate.commands.launch", "trainer")):
            child.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75, output
    assert (folder / "requeued").read_text() == "4242\n"
    assert '#SBATCH --output="of jobs/%j.txt"' in (folder / "script.sh").read_text() and (folder / "of jobs").is_dir()


def test_slurms_default_of_one_core_per_node_is_named(capsys, monkeypatch, tmp_path):
    """8 ranks and their loader workers would share it."""
    (path := tmp_path / "c.yaml").write_text("{}")
    monkeypatch.setattr(program, "start", lambda *_, **__: pytest.fail("started"))
    for words, warns in (
        ("--gpus 8", True),
        ("--gpus 8 --cpus 12", False),
        ("--gpus 8 --sbatch=--cpus-per-gpu=12", False),
        ("--gpus 1", False),
    ):
        assert program.main(["slurm", str(path), "--dry-run", *words.split(" ")]) == 0
        assert ("gives the 8 processes of a node 1 core together" in capsys.readouterr().err) == warns, words
