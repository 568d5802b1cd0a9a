"""What console.py promises: how a command ends, what Ctrl-C does, and what is shown meanwhile."""

import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import console
from testing import ROOT, start

# ---------------------------------------- how a command ends


def status_of(error):
    """exit_status of a command whose work raises this error."""

    def work():
        raise error

    return console.exit_status("train.py", work, "try --micro-batch 8", "results/x is whole")


def test_a_command_that_ends_well_has_the_status_of_its_work_and_says_nothing(capsys):
    assert console.exit_status("train.py", lambda: None, "", "") is None
    assert console.exit_status("train.py", lambda: 3, "", "") == 3
    assert capsys.readouterr() == ("", "")


def test_bad_input_is_one_line_and_status_2(capsys):
    assert status_of(console.UserError("lr must be above 0; got -1")) == 2
    assert capsys.readouterr() == ("", "train.py: error: lr must be above 0; got -1\n")
    assert status_of(FileNotFoundError(2, "No such file or directory", "last.pt")) == 2
    assert capsys.readouterr().err == (
        "train.py: error: [Errno 2] No such file or directory: 'last.pt'\n"
    )


def test_too_little_memory_is_one_line_that_says_what_to_try_and_status_2(capsys):
    """CUDA has a class for it; the words are those of MPS and cuBLAS. A CPU's are its own."""
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(10**15)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(10**15)
    for error in (
        of_torch.value,
        of_numpy.value,
        torch.OutOfMemoryError("tried to allocate 20 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert console.out_of_memory(error)
        assert status_of(error) == 2
        said = "train.py: error: out of memory; try --micro-batch 8\n"
        assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("bug"), KeyError("bug")],
    ids=repr,
)
def test_an_error_of_the_program_is_raised_with_its_traceback(error, capsys):
    assert not console.out_of_memory(error)
    with pytest.raises(type(error)) as e:
        status_of(error)
    assert e.value is error
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_says_what_is_on_disk_and_is_status_130(capsys):
    assert status_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "\ntrain.py: stopped; results/x is whole\n")


def test_a_refused_flag_is_one_line_and_status_2(capsys):
    """No usage is repeated, though the flag needs more than a line of it."""
    parser = console.Parser(prog="train.py")
    parser.add_argument("--steps", type=int)
    with pytest.raises(SystemExit) as e:
        parser.parse_args(["--steps", "many"])
    assert e.value.code == 2
    said = "train.py: error: argument --steps: invalid int value: 'many'\n"
    assert capsys.readouterr() == ("", said)


PATHS = ["train --data", "train --out", "train --resume", "evaluate", "benchmark --out", "sample"]
PATHS += [f"sample run {flag}" for flag in ("--out", "--images", "--masks")]
PATHS += ["studies labels", "studies labels run --data", "studies labels run --out"]


@pytest.mark.parametrize("words", PATHS)
def test_what_is_no_path_is_refused_by_every_command_that_takes_one(words, capsys):
    """Empty text, the home of nobody."""
    program, *words = words.split()
    for path, rule in (
        ("", "must be a path, got ''"),
        ("~no-such-user/x", "~no-such-user/x: "),
    ):
        with pytest.raises(SystemExit) as e:
            importlib.import_module(program).main([*words, path])
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1
        assert err.startswith(f"{program}.py: error: argument ") and rule in err


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    """But a file whose name begins with ~ is that file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("~x.png").touch()
    assert console.path_of("~/x.png") == str(tmp_path / "x.png")
    assert console.path_of("~x.png") == "~x.png" and console.path_of("x") == "x"


# A folder's name: a byte that is no UTF-8, an escape code, a new line
NAME, SHOWN = "bad\udcff\x1b[31m\nx", r"bad\udcff\x1b[31m\nx"


def test_a_name_is_printed_in_one_line_that_a_terminal_does_not_obey(capsys):
    console.message(f"two\nlines {NAME}")
    assert status_of(console.UserError(f"{NAME}/: ±")) == 2
    lines = f"two\nlines {SHOWN}\n".replace(r"\nx", "\nx")  # a message may have several
    assert capsys.readouterr() == (lines, f"train.py: error: {SHOWN}/: ±\n")
    assert console.printable("Thoráx ± 肺 (1).png") == "Thoráx ± 肺 (1).png"


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\x9b"])
def test_an_argument_with_a_control_character_is_refused_in_one_line(capsys, character):
    parser = console.Parser(prog="train.py")
    parser.add_argument("out")
    with pytest.raises(SystemExit) as e:
        parser.parse_args([f"a{character}b"])
    rule = f"no argument may hold a control character, got a{ascii(character)[1:-1]}b"
    assert (e.value.code, capsys.readouterr().err) == (2, f"train.py: error: {rule}\n")
    assert parser.parse_args(["a\udcffb"]).out == "a\udcffb"


def test_a_terminal_of_few_characters_gets_escapes_for_the_others(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    console.Parser().parse_args([])
    console.message("0.93 ± 0.01")
    assert sys.stdout.buffer.getvalue() == b"0.93 \\xb1 0.01\n"


# ---------------------------------------- files


def test_a_file_replaces_no_pipe_and_no_folder(tmp_path):
    """Nor a device: --out /dev/null of a superuser would leave the machine without one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("pipe", "folder", "null"):
        with pytest.raises(console.UserError, match=f"{name}: is there, and is not a file$"):
            console.write_whole(tmp_path / name, lambda f: f.write_text("x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "null", "pipe"]
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "null").is_symlink()


# ---------------------------------------- Ctrl-C


@pytest.fixture
def acted():
    """The signals that reached the handlers from before; they are this test's own."""
    signals, before = [], {}
    for sig in console.STOP_SIGNALS:
        before[sig] = signal.signal(sig, lambda sig, frame: signals.append(sig))
    yield signals
    for sig, handler in before.items():
        signal.signal(sig, handler)


def test_the_stop_signals_are_ctrl_c_terminate_and_hang_up():
    names = [sig.name for sig in console.STOP_SIGNALS]
    assert names == ["SIGINT", "SIGTERM"] + ["SIGHUP"] * hasattr(signal, "SIGHUP")


@pytest.mark.parametrize("sig", console.STOP_SIGNALS)
def test_the_first_stop_signal_is_noted_and_the_second_acts(sig, acted, capsys):
    """The second acts whichever it is: all handlers from before are back."""
    with console.StopSignals() as signals:
        signals.check()
        assert signals.received is None
        signal.raise_signal(sig)
        assert signals.received == sig and acted == []
        assert capsys.readouterr() == ("", f"\n{sig.name}: saving, one moment\n")
        with pytest.raises(console.Stopped):
            signals.check()
        for second in console.STOP_SIGNALS:
            signal.raise_signal(second)
        assert acted == console.STOP_SIGNALS and signals.received == sig
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_after_the_context_the_handlers_from_before_are_back(error, acted):
    before = [signal.getsignal(sig) for sig in console.STOP_SIGNALS]
    try:
        with console.StopSignals():
            during = [signal.getsignal(sig) for sig in console.STOP_SIGNALS]
            if error:
                raise error
    except (ValueError, KeyboardInterrupt) as e:
        assert type(e) is error, "the context hides no error"
    else:
        assert error is None
    assert [signal.getsignal(sig) for sig in console.STOP_SIGNALS] == before
    assert not set(during) & set(before)


def test_one_command_notes_its_signals_anew(acted):
    with console.StopSignals() as first:
        signal.raise_signal(signal.SIGINT)
    with console.StopSignals() as second:
        second.check()
    assert first.received and second.received is None


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_hang_up_stops_nothing_under_nohup(acted):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with console.StopSignals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.received is None and acted == []
        signal.raise_signal(signal.SIGTERM)
    assert signals.received == signal.SIGTERM


DRAWS = """import os, time, console
with console.worker_processes() as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(99)"""


def test_workers_end_by_themselves_where_their_parent_is_killed():
    """They have its stdout, which is at its end when the last of them has ended."""
    with start(["-c", DRAWS], ROOT) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
        try:
            assert parent.communicate(timeout=20)[0] == ""
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            raise


# ---------------------------------------- what a command shows


def test_a_message_is_written_at_once_into_a_pipe_too():
    """The process is ended without a flush of its own, as a kill would end it."""
    code = "import os, console; console.message('epoch 1'); os._exit(0)"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=buffered)
    assert (done.stdout.split(), done.stderr) == ([b"epoch", b"1"], b"")


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (0, "0:00"),
        (7.4, "0:07"),
        (59.6, "1:00"),
        (725, "12:05"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (3723, "1:02:03"),
        (360000, "100:00:00"),
    ],
)
def test_a_clock_has_hours_only_where_there_are_some(seconds, shown):
    assert console.clock(seconds) == shown


def test_the_progress_line_says_rate_and_time_left_every_ten_seconds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = console.progress_line("decoding")
    for seconds, done in ((1, 500), (20, 1000), (21, 1050), (3719, 33000), (3720, 33920)):
        now[0] = 100.0 + seconds
        progress(done, 33920)
    assert capsys.readouterr().err == (
        "decoding 1000/33920 50/s 10:58 left\n"  # 32920 left, at 1000 in 20 s
        "decoding 33000/33920 8.87/s 1:44 left\n"
        "decoding 33920/33920 9.12/s took 1:02:00\n"
    )


def test_on_a_terminal_the_progress_line_overwrites_itself(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = console.progress_line("x")
    for done in (1, 2, 3):
        now[0] = float(done)
        progress(done, 3)
    lines = ["x 1/3 1.00/s 0:02 left", "x 2/3 1.00/s 0:01 left", "x 3/3 1.00/s took 0:03"]
    assert capsys.readouterr().err == "".join(f"\r{line:<78}" for line in lines) + "\n"


def test_a_status_line_is_shown_every_ten_seconds_in_a_file_and_ten_times_a_second_on_a_terminal(
    monkeypatch, capsys
):
    for terminal, step in ((False, 5.0), (True, 0.0625)):
        now = [0.0]
        monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        status = console.StatusLine()
        for i in range(1, 6):
            now[0] = i * step
            status.show(str(i))
        status.show("end", last=True)
        assert capsys.readouterr().err.split() == ["2", "4", "end"]


def test_a_passes_line_adds_up_the_images_and_asks_each_time_whether_to_stop(monkeypatch, capsys):
    now, asked = [0.0], []

    def check():
        asked.append(now[0])
        if now[0] == 24:
            raise console.Stopped

    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = console.passes_line("evaluating", 96, check)
    for now[0] in (12.0, 18.0):
        progress(24)
    with pytest.raises(console.Stopped):
        now[0] = 24.0
        progress(24)
    assert asked == [12, 18, 24]
    assert capsys.readouterr().err == (
        "evaluating 24/96 2.00/s 0:36 left\nevaluating 72/96 3.00/s 0:08 left\n"
    )
    console.passes_line("alone", 5)(5)  # check may be left out
    assert capsys.readouterr().err.startswith("alone 5/5 ")
