"""
A run's folder: hold it, resume, time the steps, log, save, stop.

    state.pt              all that --resume needs; written whole, and it alone decides whether there is a run
    policy.safetensors    the weights of the last save, for sample.py and evaluate.py
    metrics.jsonl         a line per step
    flags.json            the settings
    lock                  held while a process writes to the folder
    report.html           a page with all of it; beside it before.png, after.png, before-after.png and curves.png
    samples/              pictures of the same prompts and seeds during training, and of one group

A killed run continues as if it had never stopped: (seed, step) is all of the random state, and a step that was not
saved is done again with the same numbers.
"""

import hashlib
import json
import math
import signal
import statistics
import sys
import threading
import time

import torch

import parallel
import zoo
from model import merged
from zoo import Mistake

# The flags that a resumed run may change, or whose files are compared by content. All others it must share with the
# first run, to draw the same curve.
FREE = (
    "preset", "task", "ckpt", "base", "vq_ckpt", "text_encoder", "classes", "class_names", "prompts", "pool", "steps",
    "qwen_server", "qwen_model", "judge_timeout", "judge_options", "device", "compile", "micro_batch",
    "checkpoint_layers", "shard", "out", "save_every", "resume",
)  # fmt: skip
PATIENCE = 5  # steps in a row that may fail


class Run:
    """
    The folder args.out, from the first step to the last. A context manager, because the process may be a notebook's:
    it puts back the signal handlers and the folder's lock. Raises Mistake, OSError.
    """

    def __init__(self, args):
        self.args, self.folder, self.state_file = args, args.out, args.out / "state.pt"
        self.lock = None
        self.signal, self.old_handlers = 0, {}
        self.first_step, self.history, self.said = 0, [], set()

    def __enter__(self):
        """Makes the folder and holds it, before anything takes time."""
        if self.args.resume and not self.state_file.exists():
            raise FileNotFoundError(f"{self.folder}: nothing to resume; leave out --resume to start a run in it")
        if not self.args.resume and self.state_file.exists():
            raise Mistake(f"{self.folder} holds a run: continue it with --resume, or choose another --out")
        if not self.args.resume and any(self.folder.glob("evaluation*.json")):
            raise Mistake(f"{self.folder} holds a table of evaluate.py: choose another --out")
        zoo.make_folder(self.folder / "samples")
        if parallel.rank() == 0:
            self.lock = hold(self.folder)
        return self

    def __exit__(self, *error):
        self.release_signals()
        if self.lock:
            self.lock.release()

    def begin(self, policy, optimizer):
        """Starts the run or resumes it."""
        args = self.args
        self.policy, self.optimizer = policy, optimizer
        self.settings = {name: value for name, value in vars(args).items() if name not in FREE}
        self.settings["qwen_model"] = args.judge_options["qwen_model"]  # the server's own name of its model
        if args.lr_schedule == "linear":  # each step's rate depends on them
            self.settings["steps"] = args.steps
        self.content = zoo.content_of(args.model, args.base, args.vq_ckpt, args.text_encoder)
        self.content["prompts"] = hashlib.sha256(json.dumps(args.pool).encode()).hexdigest()
        if args.resume:
            self.resume()
        # what a killed run logged beyond its last save goes
        log = "".join(json.dumps(row) + "\n" for row in self.history)
        flags = json.dumps(self.settings | dict(steps=args.steps), indent=1)
        zoo.write_whole(self.folder / "metrics.jsonl", lambda path: path.write_text(log))
        zoo.write_whole(self.folder / "flags.json", lambda path: path.write_text(flags))
        if self.first_step < args.steps and threading.current_thread() is threading.main_thread():
            self.catch_signals()  # Python lets only the main thread handle them
        self.seconds, self.since = {}, time.perf_counter()

    def lap(self, part):
        """Charges the time since the last lap to `part`."""
        zoo.synchronize(self.args.device)
        now = time.perf_counter()
        self.seconds[part] = now - self.since
        self.since = now

    def catch_signals(self):
        """The first signal to stop lets the step end in a save. USR1 is Slurm's warning before the end of a job."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has only the first two
            if number and signal.getsignal(number) not in (signal.SIG_IGN, None):  # as under nohup; not Python's
                self.old_handlers[number] = signal.signal(number, self.ask_to_stop)

    def release_signals(self):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        self.old_handlers = {}

    def ask_to_stop(self, number, frame):
        """A second signal does what it did before the run."""
        now = time.monotonic()
        if not self.signal:
            self.signal, self.asked_at = number, now
            parallel.say("this step will be finished and saved; a second signal stops at once")
        elif now > self.asked_at + 1:  # torchrun repeats a Ctrl-C that has reached all processes already
            self.release_signals()
            signal.raise_signal(number)

    def end_step(self, step, metrics):
        """Logs a step and saves where it is time. Ends the run if a signal came, or nothing is learned any more."""
        self.history.append(metrics)
        if parallel.rank() == 0:
            self.log(metrics)
        stopping = parallel.largest(self.signal)  # a signal may have reached any of the processes
        last = step + 1 == self.args.steps
        if stopping or last or (step + 1) % self.args.save_every == 0:
            self.save(step + 1)
        if stopping:
            parallel.say(f"stopped after step {step}; the same command with --resume continues from there")
            sys.exit(128 + stopping)
        if last:
            self.release_signals()  # only pages follow, which --resume makes again
        self.check_that_it_learns()
        self.seconds, self.since = {}, time.perf_counter()  # grids and saves are not charged to a step

    def log(self, metrics):
        metrics = metrics | {f"seconds_{part}": value for part, value in self.seconds.items()}
        if peak := zoo.peak_memory_gb(self.args.device):
            metrics["peak_memory_gb"] = peak
        metrics = {name: float(f"{v:.6g}") if isinstance(v, float) else v for name, v in metrics.items()}
        path = self.folder / "metrics.jsonl"
        with zoo.writing(path), open(path, "a") as file:
            file.write(json.dumps(metrics) + "\n")
        parallel.say(step_line(metrics, self.args.rewards, sum(self.seconds.values()), self.args.steps))
        for what, sentence in warnings(self.history, self.settings).items():
            if what not in self.said:
                parallel.say(f"WARNING: {sentence}")
                self.said.add(what)

    def check_that_it_learns(self):
        last, images = self.history[-PATIENCE:], self.args.prompts_per_step * self.args.group_size
        failed = [] if any(math.isfinite(row["grad_norm"]) for row in last) else ["the gradient"]
        for judge in self.args.rewards:
            if all(row[f"{judge}_not_finite"] == images for row in last):
                failed.append(f"every score of {judge}")
        if failed and len(last) == PATIENCE:
            raise Mistake(f"{failed[0]} was not finite {PATIENCE} steps in a row; the last save is in {self.folder}")

    def save(self, steps_done):
        """
        policy.safetensors, for the other scripts, then state.pt. A run killed between the two resumes from the state
        before, and comes to the same policy again.
        """
        weights, optimizer = parallel.full_state(self.policy, self.optimizer)
        plain = {name: value.detach().contiguous() for name, value in merged(weights).items()}
        names = "model", "text_pad", "cfg_scale", "temperature"
        header = {name: self.settings[name] for name in names} | dict(step=steps_done, content=self.content)
        zoo.write_whole(self.folder / "policy.safetensors", lambda path: zoo.save_weights(plain, path, header))
        state = dict(step=steps_done, settings=self.settings, content=self.content, policy=weights, optimizer=optimizer)
        zoo.write_whole(self.state_file, lambda path: torch.save(state, path))

    def resume(self):
        """Restores policy and optimizer from state.pt, the history from metrics.jsonl. Raises Mistake."""
        remedy = f"start again in another --out, or from the last policy with --ckpt {self.folder}"
        with zoo.reading(self.state_file, remedy):
            state = zoo.load_tensors(self.state_file)  # on the CPU, where AdamW wants its step counters
            self.first_step = int(state["step"])
            for name, value in self.settings.items():
                if (was := state["settings"].get(name)) != value:
                    flag = f"--{name.replace('_', '-')}"
                    raise Mistake(f"{flag} is {value}, but {self.folder} began with {was}: give that, or {remedy}")
            for name, value in self.content.items():
                if state["content"].get(name) != value:
                    raise Mistake(f"the run in {self.folder} began with another {name}: its content differs; {remedy}")
            if self.first_step > self.args.steps:
                raise Mistake(f"{self.folder} has done {self.first_step} steps already; --steps counts them all")
            parallel.load_full_state(self.policy, self.optimizer, state["policy"], state["optimizer"])
        path = self.folder / "metrics.jsonl"
        # A killed run may have logged more than it saved, and its last line in part. A user may have deleted the file.
        lines = path.read_text().splitlines()[: self.first_step] if path.exists() else []
        with zoo.reading(path, "delete it and resume: the weights are whole"):
            self.history = [row for row in map(json.loads, lines) if row["step"] < self.first_step]


def warnings(history, settings):
    """{what: sentence} about the last step of a run that ails. history: metrics of its steps; settings: flags.json."""
    now, ten = history[-1], history[-10:]
    found = {}
    if now["grad_norm"] == 0 and now["equal_groups"] < 1:
        found["gradient"] = "no gradient arrives: look at what requires_grad, and at the loss"
    if now["sampler_gap"] > (0.1 if settings["dtype"] == "bfloat16" else 1e-3):
        found["gap"] = "what is trained is not what was sampled (sampler_gap); see --learn-cfg"
    if len(history) > 20 and now["entropy"] < history[-21]["entropy"] / 2:
        found["entropy"] = "entropy has fallen by half within twenty steps: lower --lr or raise --kl-coef"
    if len(ten) == 10:  # a single batch is noisy
        if all(row["equal_groups"] == 1 for row in ten):
            found["equal"] = "all rewards of a group were equal for ten steps, and teach nothing: look at the judges"
        if statistics.fmean(row["kl"] for row in ten) > 1:
            found["kl"] = "the policy is more than a nat per token from its reference: raise --kl-coef or lower --lr"
        for judge in settings["rewards"]:
            if all(row.get(f"{judge}_std", 0) == 0 for row in ten):
                found[judge] = f"{judge} was constant or missing for ten steps: look at its scores"
    held_out = [f"{judge}_mean" for judge, weight in settings["rewards"].items() if weight == 0]
    for witness in ["right", *held_out]:
        if rises(history, "reward") > 3 and rises(history, witness) < -3:
            found[witness] = f"the reward rises while {witness} falls: the judges are being hacked; look at the samples"
    return found


def rises(history, name):
    """
    By how many standard errors a metric's mean over the newer half of the last 20 to 40 steps is above that of the
    older half. 0 before step 20; NaN if a step lacks the metric.
    """
    n = min(20, len(history) // 2)
    if n < 10:
        return 0.0
    before, after = ([row.get(name, math.nan) for row in rows] for rows in (history[-2 * n : -n], history[-n:]))
    error = math.sqrt((statistics.variance(before) + statistics.variance(after)) / n)
    return (statistics.fmean(after) - statistics.fmean(before)) / (error + 1e-9)


def hold(folder):
    """The lock of a folder, or None on a file system without locks. Raises Mistake if another run holds it."""
    from filelock import FileLock, Timeout

    # a soft lock, which is a mere file, would outlive a killed run
    lock = FileLock(folder / "lock", fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
        return lock
    except Timeout:
        raise Mistake(f"another run is writing to {folder}: wait for it, or choose another --out") from None
    except (OSError, NotImplementedError) as error:
        parallel.say(f"{folder}: no lock on this file system ({error}), so do not start a second run in it")
        return None


def step_line(metrics, judges, seconds, steps):
    """A step on the screen."""
    parts = [f"step {metrics['step']:4d}/{steps}", f"reward {metrics['reward']:6.3f}"]
    if "right" in metrics:
        parts.append(f"right {metrics['right']:4.0%}")
    parts += [f"kl {metrics['kl']:.4f}", f"entropy {metrics['entropy']:.3f}"]
    parts += [f"{judge} {metrics.get(f'{judge}_mean', math.nan):.3f}" for judge in judges]
    missing = sum(metrics[f"{judge}_not_finite"] for judge in judges)
    if missing:
        parts.append(f"{missing} scores missing")
    return "  ".join([*parts, f"sampler_gap {metrics['sampler_gap']:.0e}", f"{seconds:.2f} s"])
