"""What a command shows while it works, and how it ends: progress, refusals, Ctrl-C."""

import argparse
import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

# ---------------------------------------- how a command ends


class UserError(ValueError):
    """Something the user can mend. Its message is one line that names the rule and the value."""


class Stopped(Exception):
    """One of STOP_SIGNALS arrived: save the run and leave it."""


class Parser(argparse.ArgumentParser):
    """argparse, with a refusal of one line: the usage is not repeated."""

    def parse_args(self, args=None, namespace=None):
        """Refuses control characters. stdout now shows as an escape what it cannot encode."""
        with contextlib.suppress(AttributeError):  # a notebook's stdout
            sys.stdout.reconfigure(errors="backslashreplace")
        for word in sys.argv[1:] if args is None else args:
            if re.search(r"[\x00-\x1f\x7f-\x9f]", word):
                self.error(f"no argument may hold a control character, got {word}")
        return super().parse_args(args, namespace)

    def error(self, message):
        self.exit(2, printable(f"{self.prog}: error: {message}") + "\n")


def printable(text):
    """One line, with an escape for each character that a terminal obeys or that no UTF-8 has."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def path_of(text):
    """A path of the command line, as text; what is not there already may begin with ~, the home."""
    if not text:
        raise argparse.ArgumentTypeError(f"must be a path, got {text!r}")
    try:
        return text if os.path.exists(text) else str(Path(text).expanduser())
    except RuntimeError as e:
        raise argparse.ArgumentTypeError(f"{text}: {e}") from e


def out_of_memory(error):
    """Whether an error says so. CUDA and numpy have classes for it, MPS, cuBLAS and CPUs words."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    said = any(word in str(error) for word in words)
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def fits(name, job):
    """Whether a job finds the memory it needs. If not, a line on stderr says so."""
    try:
        job()
    except (RuntimeError, MemoryError, UserError) as e:
        if not out_of_memory(e):
            raise
        print(f"{name}: out of memory, left out", file=sys.stderr)
        return False
    return True


def exit_status(program, work, less_memory, left_behind):
    """The status of a command: what work() returns, or that of its error, after one line about it.

    2: bad input, or too little memory (less_memory says what to try)
    130: Ctrl-C (left_behind says what is on disk)
    """
    try:
        return work()
    except (UserError, OSError) as e:
        print(printable(f"{program}: error: {e}"), file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        print(f"{program}: error: out of memory; {less_memory}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: stopped; {left_behind}", file=sys.stderr)
        return 130


# ---------------------------------------- files


def refuse(wrong, message):
    """UserError with the message, if something is wrong."""
    if wrong:
        raise UserError(message)


def refuse_out(out, script, starts):
    """UserError: --out cannot be written, or is a file of something else. None: nothing to write.

    starts  what each result of this script starts with: such a file is replaced
    """
    if out is not None:
        file = Path(out).absolute()
        place = next(folder for folder in file.parents if folder.exists())
        earlier = file.is_file() and file.read_bytes().startswith(starts.encode())
        free = place.is_dir() and os.access(place, os.W_OK) and (earlier or not file.exists())
        rule = f"--out must be a new file where one can be written, or a result of {script}"
        refuse(not free, f"{rule}, got {out}")


@contextlib.contextmanager
def failure_named(path, size="room"):
    """UserError where a file cannot be written, with its path; torch says so in a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        if out_of_memory(e):
            raise
        why = str(getattr(e, "strerror", None) or e).split("\n")[0].split("] . ")[-1][:100]
        free = f"{shutil.disk_usage(path.parent).free / 1e6:.0f} MB are free"
        needed = f"a new file needs {size} and an inode beside the old one, which stays; {free}"
        raise UserError(f"{path}: not written: {why}; {needed}") from e


@contextlib.contextmanager
def opened(folder):
    """The descriptor of a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def refuse_pipe(path):
    """UserError: a folder, a pipe or a device has that name. Reading a pipe might never end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is there, and is not a file")


def write_whole(path, write, size="room"):
    """write(temporary path), then rename: the file is there whole or not at all.

    UserError: it cannot be written, as on a full disk, where it needs `size` more; or by
    refuse_pipe.
    """
    refuse_pipe(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with failure_named(path, size):
            write(temporary)
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError), opened(path.parent) as descriptor:
        os.fsync(descriptor)  # else a power cut can undo the rename; Windows opens no folder


# ---------------------------------------- Ctrl-C

NAMES_OF_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
STOP_SIGNALS = [getattr(signal, name) for name in NAMES_OF_SIGNALS if hasattr(signal, name)]


class StopSignals(contextlib.AbstractContextManager):
    """While the context is open, the first stop signal sets `received`. A second acts at once.

    nohup makes a process deaf to SIGHUP. It stays so.
    """

    received = None

    def __enter__(self):
        nohup = {s for s in STOP_SIGNALS[2:] if signal.getsignal(s) == signal.SIG_IGN}
        heard = [sig for sig in STOP_SIGNALS if sig not in nohup]
        self.handlers_before = {sig: signal.signal(sig, self.receive) for sig in heard}
        return self

    def receive(self, sig, frame):
        self.received = sig
        self.__exit__()
        print(f"\n{signal.Signals(sig).name}: saving, one moment", file=sys.stderr, flush=True)

    def __exit__(self, *error):
        for sig, handler in self.handlers_before.items():
            signal.signal(sig, handler)

    def check(self):
        """Raise Stopped if a signal was received."""
        if self.received:
            raise Stopped


@contextlib.contextmanager
def worker_processes():
    """A ProcessPoolExecutor. A stop signal or an error cancels the jobs that have not begun."""
    spawn, signals = multiprocessing.get_context("spawn"), StopSignals()
    signals.receive = signal.default_int_handler  # SIGTERM is a Ctrl-C here
    with signals, ProcessPoolExecutor(None, spawn, begin_worker) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)  # and waits for the jobs that have begun


def begin_worker():
    """A worker leaves Ctrl-C to its parent. It ends when the parent ends, killed or not."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


# ---------------------------------------- what a command shows


def message(text):
    """Print lines on stdout now, also into a pipe."""
    print("\n".join(map(printable, text.split("\n"))), flush=True)


class StatusLine:
    """A line on stderr. A terminal overwrites it. A file gets one every 10 s, and the last one."""

    def __init__(self):
        self.shown_at = time.monotonic()

    def show(self, text, last=False):
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if last or now - self.shown_at >= (0.1 if terminal else 10):
            self.shown_at = now
            line, end = (f"\r{text:<78}", "\n" if last else "") if terminal else (text, "\n")
            print(line, end=end, file=sys.stderr, flush=True)


def clock(seconds):
    """Seconds as 0:07, 12:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
    return f"{minutes}:{rest:02}"


def progress_line(label):
    """progress(done, total) shows `label 1200/33920 540/s 1:01 left`, at the end its time."""
    status, began = StatusLine(), time.monotonic()

    def progress(done, total):
        seconds = time.monotonic() - began
        rate = done / max(seconds, 1e-9)
        time_left = (
            f"{clock((total - done) / rate)} left" if done < total else f"took {clock(seconds)}"
        )
        digits = 0 if rate >= 10 else 2
        status.show(f"{label} {done}/{total} {rate:.{digits}f}/s {time_left}", last=done == total)

    return progress


def passes_line(label, total, check=lambda: None):
    """progress(images) for the samplers: adds up images, of `total`, and calls check()."""
    show, done = progress_line(label), 0

    def progress(images):
        nonlocal done
        done += images
        show(done, total)
        check()

    return progress
