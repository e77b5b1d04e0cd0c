"""
A run's folder: hold it, resume, time the steps, log, save, stop.

    state.pt              all that --resume needs; written whole, and it alone decides whether there is a run
    policy.safetensors    the weights of the last save, for sample.py and evaluate.py
    metrics.jsonl         a line per step; TensorBoard events beside it hold the same
    flags.json            the settings
    lock                  held while a process writes to the folder

A killed run continues as if it had never stopped: (seed, step) is all of the random state, and a step that was not
saved is done again with the same numbers.
"""

import hashlib
import json
import math
import os
import signal
import statistics
import sys
import time
from collections import Counter

import torch
from tqdm import tqdm

import parallel
import zoo
from model import merged
from zoo import Mistake

# What a resumed run must share with the first to draw the same curve. Files are compared by content, in `content_of`.
SETTINGS = (
    "model", "seed", "prompts_per_step", "group_size", "learn_from", "temperature", "cfg_scale", "score_cfg",
    "ref_cfg", "text_pad", "rewards", "reward_norm", "clip_model", "clip_pretrained", "qwen_answer", "qwen_model",
    "lr", "lr_schedule", "adam_beta2", "kl_coef", "kl", "weigh_tokens", "clip_eps", "updates_per_batch", "lora_rank",
    "dtype",
)  # fmt: skip
PATIENCE = 5  # steps in a row that may fail
SAMPLE_EVERY = 50  # steps between grids of the same prompts and seeds


class Run:
    """The folder args.out, from the first step to the last. Raises Mistake, OSError."""

    def __init__(self, args):
        """Makes the folder and holds it, before anything takes time."""
        self.args, self.folder, self.state_file = args, args.out, args.out / "state.pt"
        self.signal, self.failures, self.lock = 0, Counter(), None
        if args.resume and not self.state_file.exists():
            raise FileNotFoundError(f"{self.folder}: nothing to resume; leave out --resume to start a run in it")
        if not args.resume and self.state_file.exists():
            raise Mistake(f"{self.folder} holds a run: continue it with --resume, or choose another --out")
        zoo.make_folder(self.folder)
        zoo.make_folder(self.folder / "samples")
        if parallel.rank() == 0:
            self.lock = hold(self.folder)

    def begin(self, policy, optimizer):
        """Starts the run or resumes it. From here on, the first signal to stop lets the step end in a save."""
        self.policy, self.optimizer, self.first_step = policy, optimizer, 0
        self.settings, self.content = settings_of(self.args), content_of(self.args)
        if self.args.resume:
            self.resume()
        self.cut_metrics()
        text = json.dumps(self.settings | dict(steps=self.args.steps), indent=1)
        zoo.write_whole(self.folder / "flags.json", lambda path: path.write_text(text))
        self.bar = tqdm(initial=self.first_step, total=self.args.steps, unit="step", disable=parallel.rank() > 0)
        if parallel.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # here, because its import takes seconds

            self.events = SummaryWriter(self.folder, purge_step=self.first_step)
        for number in stop_signals():
            signal.signal(number, self.ask_to_stop)
        self.start_clock()

    # time

    def start_clock(self):
        self.seconds, self.since = {}, time.perf_counter()

    def lap(self, part):
        """Charges the time since the last lap to `part`."""
        zoo.synchronize(self.args.device)
        now = time.perf_counter()
        self.seconds[part] = now - self.since
        self.since = now

    # the end of a step

    def end_step(self, step, metrics, draw_grid):
        """
        Logs a step, calls draw_grid(name, title) and saves where it is time. Ends the run if a signal came, or if
        nothing is learned any more.
        """
        self.lap("report")
        if parallel.rank() == 0:
            self.log(metrics)
        if (step + 1) % SAMPLE_EVERY == 0:
            draw_grid(f"samples/step_{step + 1:05d}.png", f"after {step + 1} steps")
        stopping = parallel.largest(self.signal)  # a signal may have reached any of the processes
        if stopping or (step + 1) % self.args.save_every == 0 or step + 1 == self.args.steps:
            self.save(step + 1)
        if stopping:
            self.close()
            print(f"stopped after step {step}; the same command with --resume continues from there")
            sys.exit(128 + stopping)
        self.check_that_it_learns(metrics)
        self.start_clock()  # grids and saves are not charged to a step

    def log(self, metrics):
        metrics = metrics | {f"seconds_{part}": value for part, value in self.seconds.items()}
        peak = zoo.peak_memory_gb(self.args.device)
        if peak is not None:
            metrics["peak_memory_gb"] = peak
        metrics = {name: float(f"{v:.6g}") if isinstance(v, float) else v for name, v in metrics.items()}
        path = self.folder / "metrics.jsonl"
        with zoo.writing(path), open(path, "a") as file:
            file.write(json.dumps(metrics) + "\n")
        with zoo.writing(self.folder / "events*"):
            for name, value in metrics.items():
                self.events.add_scalar(name, value, metrics["step"])
        self.bar.write(step_line(metrics, self.args.judge_weights, sum(self.seconds.values())))
        self.bar.update()
        self.history.append(metrics)
        for what, sentence in warnings(self.history, self.settings).items():
            if what not in self.said:
                self.bar.write(f"WARNING: {sentence}")
                self.said.add(what)

    def check_that_it_learns(self, metrics):
        images = self.args.prompts_per_step * self.args.group_size
        failed = {"the gradient": not math.isfinite(metrics["grad_norm"])}
        for judge in self.args.judge_weights:
            failed[f"every score of {judge}"] = metrics[f"{judge}_not_finite"] == images
        for what, has_failed in failed.items():
            self.failures[what] = self.failures[what] + 1 if has_failed else 0
            if self.failures[what] == PATIENCE:
                raise Mistake(f"{what} was not finite {PATIENCE} steps in a row; the last save is in {self.folder}")

    def ask_to_stop(self, number, frame):
        """The first signal lets the step end in a save; a second one stops at once."""
        now = time.monotonic()
        if self.signal and now > self.asked_at + 1:  # torchrun repeats a Ctrl-C that has reached all processes already
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.signal:
            self.signal, self.asked_at = number, now
            tqdm.write("this step will be finished and saved; a second signal stops at once")

    def close(self):
        """After the last step: signals act at once again."""
        for number in stop_signals():
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self.bar.close()
        if parallel.rank() == 0:
            self.events.close()

    # saving and resuming

    def save(self, steps_done):
        weights, optimizer = parallel.full_state(self.policy, self.optimizer)
        state = dict(step=steps_done, settings=self.settings, content=self.content, policy=weights, optimizer=optimizer)
        zoo.write_whole(self.state_file, lambda path: torch.save(state, path))
        self.save_policy(weights, steps_done)

    def save_policy(self, weights, steps_done):
        """policy.safetensors. Its header says which model this is, what it began from and how it was sampled from."""
        args = self.args
        weights = {name: value.detach().contiguous() for name, value in merged(weights).items()}
        header = dict(
            model=args.model, step=steps_done, content=self.content, base_path=str(zoo.find_file(args.base).resolve()),
            text_pad=args.text_pad, cfg_scale=args.cfg_scale, temperature=args.temperature,
        )  # fmt: skip
        zoo.write_whole(self.folder / "policy.safetensors", lambda path: zoo.save_weights(weights, path, header))

    def resume(self):
        """Restores policy and optimizer from state.pt; sets first_step. Raises Mistake."""
        remedy = f"start again in another --out, or from the last policy with --ckpt {self.folder}"
        with zoo.reading(self.state_file, remedy):
            state = zoo.load_tensors(self.state_file)  # on the CPU, where AdamW wants its step counters
            step, settings, content = int(state["step"]), dict(state["settings"]), dict(state["content"])
        for name, value in self.settings.items():
            if settings.get(name) != value:
                flag = f"--{name.replace('_', '-')}"
                was = settings.get(name)
                raise Mistake(f"{flag} is {value}, but {self.folder} began with {was}: give that, or {remedy}")
        for name in sorted({*content, *self.content}):
            if content.get(name) != self.content.get(name):
                raise Mistake(f"the run in {self.folder} began with another {name}: its content differs; {remedy}")
        if step > self.args.steps:
            raise Mistake(f"the run in {self.folder} has done {step} steps already; --steps counts them all")
        with zoo.reading(self.state_file, f"it is of another model; {remedy}"):
            parallel.load_full_state(self.policy, self.optimizer, state["policy"], state["optimizer"])
        weights, _ = parallel.full_state(self.policy, self.optimizer)
        self.save_policy(weights, step)  # a run killed between its two files has an older one
        self.first_step = step

    def cut_metrics(self):
        """Leaves in metrics.jsonl the steps before the first: a killed run may have logged more than it saved."""
        path = self.folder / "metrics.jsonl"
        # no line after these, because a killed run may have cut its last; by step, because a user may delete the file
        lines = path.read_text().splitlines()[: self.first_step] if path.exists() else []
        with zoo.reading(path, "delete it and resume: the weights are whole"):
            self.history = [row for row in map(json.loads, lines) if row["step"] < self.first_step]
        text = "".join(json.dumps(row) + "\n" for row in self.history)
        zoo.write_whole(path, lambda new: new.write_text(text))
        self.said = set()


def warnings(history, settings):
    """
    {what: sentence} about the last step of a run that ails; {} for a healthy one. history: the metrics of its steps so
    far; settings: those of flags.json.
    """
    now, ten = history[-1], history[-10:]
    found = {}
    if now["grad_norm"] == 0 and now["equal_groups"] < 1:
        found["gradient"] = "no gradient arrives: look at what requires_grad, and at the loss"
    if len(ten) == 10 and all(row["equal_groups"] == 1 for row in ten):
        found["equal"] = "all rewards of a group were equal for ten steps, which teaches nothing: look at the judges"
    if settings["updates_per_batch"] == "1" and abs(now["ratio"] - 1) > 1e-3:
        found["ratio"] = "the ratio is not 1 before the first update: pi_old is not the policy that is scored"
    if now["sampler_gap"] > (0.1 if settings["dtype"] == "bfloat16" else 1e-3):
        found["gap"] = (
            "sampler and scorer differ (sampler_gap): what is trained is not what was sampled; see --score-cfg"
        )
    if len(history) > 20 and now["entropy"] < history[-21]["entropy"] / 2:
        found["entropy"] = "entropy has fallen by half within twenty steps: lower --lr or raise --kl-coef"
    if len(ten) == 10 and statistics.fmean(row["kl"] for row in ten) > 1:  # of one batch it is noisy
        found["kl"] = "the policy is more than a nat per token from its reference: raise --kl-coef or lower --lr"
    weights = dict(part.partition("=")[::2] for part in settings["rewards"].split(","))
    for judge, weight in weights.items():
        if len(ten) == 10 and all(row.get(f"{judge}_std", 0) == 0 for row in ten):
            found[judge] = f"{judge} was constant or missing for ten steps: look at its scores"
        if weight and float(weight) == 0:
            found |= hacking(history, f"{judge}_mean")
    return found | hacking(history, "right")


def hacking(history, witness):
    """A warning if the reward rises while a witness without a say falls: by three standard errors, in twenty steps."""
    before, after = history[-40:-20], history[-20:]
    changes = {}
    for name in ("reward", witness):
        first, last = ([row.get(name, math.nan) for row in rows] for rows in (before, after))
        if len(first) == 20:
            error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / 20)
            changes[name] = (statistics.fmean(last) - statistics.fmean(first)) / (error + 1e-9)
    if changes.get("reward", 0) > 3 and changes.get(witness, 0) < -3:
        return {witness: f"the reward rises while {witness} falls: the judges are being hacked; look at the samples"}
    return {}


def settings_of(args):
    """{name: text} of SETTINGS, and of --steps where each step's learning rate depends on it."""
    values = vars(args) | dict(qwen_model=args.judge_options["qwen_model"])  # the model that the server answers with
    names = [*SETTINGS, "steps"] if args.lr_schedule == "linear" else SETTINGS
    return {name: str(values[name]) for name in names}


def content_of(args):
    """{name: sha256} of what the run reads: base, tokenizer, text encoder, prompts."""
    prompts = hashlib.sha256(json.dumps(args.pool).encode()).hexdigest()
    return zoo.content_of(args.model, args.base, args.vq_ckpt, args.text_encoder) | dict(prompts=prompts)


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
        print(f"{folder}: no lock on this file system ({error}), so do not start a second run in it")
        return None


def stop_signals():
    """The signals that ask a run to stop, except those that are ignored, as SIGHUP under nohup."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def step_line(metrics, judges, seconds):
    """A step on the screen."""
    parts = [f"step {metrics['step']:4d}", f"reward {metrics['reward']:6.3f}"]
    if "right" in metrics:
        parts.append(f"right {metrics['right']:4.0%}")
    parts += [f"kl {metrics['kl']:.4f}", f"entropy {metrics['entropy']:.3f}"]
    parts += [f"{judge} {metrics.get(f'{judge}_mean', math.nan):.3f}" for judge in judges]
    missing = sum(metrics[f"{judge}_not_finite"] for judge in judges)
    if missing:
        parts.append(f"{missing} scores missing")
    return "  ".join([*parts, f"ratio {metrics['ratio']:.4f}", f"{seconds:.2f} s"])
