"""Time and weigh one full search step of our supernet beside two other ways to take it.

    python benchmarks/supernet.py --settings small:8 small:2 --rounds 7
    python benchmarks/supernet.py --settings small:8 thesis:1 --rounds 5 --hand-back

A full step trains α, β, γ (the teacher widest, the student sampled) and W (the teacher widest, the student widest,
narrowest and sampled): six passes, each back-propagated at once. It is compared with

* ``nni``: NNI's GumbelDARTS on the same space and data, its own step: one pass for the architecture, one for W. Since
  it passes twice where we pass six times, the table gives throughput by step and by pass;
* ``output``: FasterSeg's order in our space: every cell runs on both inputs, each operator by itself, and sums after;
  the graphs of all passes are held until one backward pass at the end;
* ``unfused``: ours, but each operator of a cell by itself;
* ``compiled``: ours, with stems and heads given to torch.compile (``search.compile``).

A setting is PRESET:BATCH; several are measured one after the other. Each way runs in a process of its own, for its
memory; the processes take turns, one step each, so that slow spells of the machine hit all alike. Throughput is the
median over the rounds of the ratio within a round. Memory is counted twice: ``process`` is the resident memory at its
peak beyond what the process held before its first step; ``tensors`` is what PyTorch allocates at once during a step (on
a GPU: its peak), without the buffers that libraries and malloc keep.

Only one process steps at a time, but malloc keeps what it was given. With ``--hand-back`` each process returns it to
the system after its step, so that the largest way alone decides what fits; all ways then pay for fresh memory in every
step. What a setting needs is counted before it starts, without computing anything, and one that does not fit is left
out.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

WAYS = ("ours", "nni", "output", "unfused", "compiled")
DEFAULT_WAYS = WAYS[:3]


def make_space(way: str, args: argparse.Namespace) -> Any:
    """Build the space of a way."""
    from glioma_nas import registry

    options: dict[str, Any] = {"merge": "output"} if way == "output" else {}
    if args.image_size:
        options["image_size_px"] = args.image_size
    return registry.search_spaces.get("nasbranet")(args.preset, **options)


def needed_mb(way: str, args: argparse.Namespace) -> dict[str, float]:
    """Count on the meta device what a way holds all the time, ``kept``, and during its step, ``step``."""
    import nni.nas.strategy
    import torch

    from glioma_nas.search_spaces.network_figures import saved_bytes

    space = make_space(way, args)
    if way == "nni":
        nni.nas.strategy.GumbelDARTS().mutate_model(space)
        space.train().to("meta")
        side = space.layout.image_size_px
        image = torch.zeros(args.batch, space.layout.in_channels, side, side, device="meta")
        with saved_bytes(space) as saved:
            space(image)
        weights = 4 * sum(parameter.numel() for parameter in space.parameters())
        return {"kept": 3 * weights / 1e6, "step": saved.total / 1e6}
    memory = space.search_memory(args.batch)
    # The graphs of four passes, two of them narrow, are held together; each operator's output is kept by itself.
    held = {"output": 3, "unfused": 1.5}.get(way, 1)
    return {"kept": memory.fixed_bytes / 1e6, "step": (held * memory.activation_bytes + memory.working_bytes) / 1e6}


def make_step(way: str, args: argparse.Namespace) -> Callable[[], int]:
    """Build a supernet with its optimisers and return a function that takes one step and says how many passes."""
    import nni.nas.strategy
    import torch

    from glioma_nas.compilation import compile_for_training
    from glioma_nas.losses import segmentation_loss
    from glioma_nas.search_spaces.supernet import SearchCell
    from glioma_nas.strategies.architecture_parameters import ArchitectureParameters, choices_of, groups_of
    from glioma_nas.strategies.one_shot import CoSearch

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    SearchCell.fused = way in ("ours", "compiled")
    space = make_space(way, args)
    layout = space.layout
    strategy = nni.nas.strategy.GumbelDARTS() if way == "nni" else CoSearch(latency_weight=0)
    strategy.mutate_model(space)
    space.train().to(device)
    if way == "compiled":
        compile_for_training(space)
    side = layout.image_size_px
    images = torch.randn(2, args.batch, layout.in_channels, side, side, device=device)
    masks = torch.randint(layout.n_classes, (2, args.batch, side, side), device=device)
    loss_of = segmentation_loss("focal")

    if way == "nni":
        alphas = [parameter for name, parameter in space.named_parameters() if "_arch_alpha" in name]
        known = {id(parameter) for parameter in alphas}
        weights = [parameter for parameter in space.parameters() if id(parameter) not in known]
        w_optimizer, a_optimizer = _optimizers(weights, alphas)

        def nni_step() -> int:
            for optimizer, image, mask in ((a_optimizer, images[1], masks[1]), (w_optimizer, images[0], masks[0])):
                optimizer.zero_grad()
                loss_of(space(image), mask).backward()
                optimizer.step()
            return 2

        return nni_step

    sets = {
        name: ArchitectureParameters(
            name,
            choices=choices_of(space),
            groups=groups_of(space),
            fixed=space.fixed_choices[name],
            search_widths=name == "student",
        ).to(device)
        for name in ("teacher", "student")
    }
    weights = list(space.parameters())
    w_optimizer, a_optimizer = _optimizers(weights, [p for item in sets.values() for p in item.parameters()])
    passes = [("teacher", "max"), ("student", "max"), ("student", "min"), ("student", "sampled")]
    slot = strategy.relaxation_slot

    def loss(name: str, rule: str, image: Any, mask: Any, *, differentiable: bool) -> Any:
        with slot.using(sets[name].relaxation(rule, differentiable=differentiable)):
            return loss_of(space(image), mask)

    def step() -> int:
        for parameter in weights:
            parameter.requires_grad_(False)
        a_optimizer.zero_grad()
        for name in sets:
            loss(name, "sampled", images[1], masks[1], differentiable=True).backward()
        a_optimizer.step()
        for parameter in weights:
            parameter.requires_grad_(True)
        w_optimizer.zero_grad()
        for name, rule in passes:
            loss(name, rule, images[0], masks[0], differentiable=False).backward()
        w_optimizer.step()
        return 6

    def step_with_all_graphs_held() -> int:
        # FasterSeg does not freeze W in the architecture step, and sums all losses before one backward pass.
        a_optimizer.zero_grad()
        sum(loss(name, "sampled", images[1], masks[1], differentiable=True) for name in sets).backward()
        a_optimizer.step()
        w_optimizer.zero_grad()
        sum(loss(name, rule, images[0], masks[0], differentiable=False) for name, rule in passes).backward()
        w_optimizer.step()
        return 6

    return step_with_all_graphs_held if way == "output" else step


def _optimizers(weights: Any, architecture: Any) -> tuple[Any, Any]:
    import torch

    return (
        torch.optim.SGD(weights, lr=0.01, momentum=0.9, weight_decay=5e-4),
        torch.optim.Adam(architecture, lr=3e-4, betas=(0.5, 0.999)),
    )


def work(way: str, args: argparse.Namespace) -> None:
    """Say what memory is needed, then take a step for every line on standard input; at last count.

    Every answer is a line of JSON; one for each step has its seconds and the memory.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    print(json.dumps(needed_mb(way, args)), flush=True)
    # A throw-away convolution first: what the libraries themselves take is not the step's.
    torch.nn.functional.conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3))
    step = make_step(way, args)
    cuda = args.device.startswith("cuda")
    resident = _resident_mb()
    taken = 0
    for _ in sys.stdin:
        start = time.perf_counter()
        passes = step()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        taken += 1
        if args.hand_back:
            _hand_back()
        print(json.dumps({"s": seconds, "passes": passes, "process_mb": peak_mb - resident}), flush=True)
    if not taken:
        return
    # Counting takes time and memory itself, so it comes last.
    with FlopCounterMode(display=False) as counter:
        step()
    tensors_mb = torch.cuda.max_memory_allocated() / 1e6 if cuda else _peak_of_tensors_mb(step)
    print(json.dumps({"gflop": counter.get_total_flops() / 1e9, "tensors_mb": tensors_mb}), flush=True)


def _peak_of_tensors_mb(step: Callable[[], int]) -> float:
    # What PyTorch allocates during the step beyond weights and momenta: without what libraries and malloc keep.
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


def _hand_back() -> None:
    """Return free memory to the system; glibc only, elsewhere malloc keeps it."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident_mb() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss / 1e6)


class SettingFailed(Exception):
    """A setting was not measured; the message says why."""


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Let the ways take turns and return what each answered, round by round, the warm-up left out.

    Raises:
        SettingFailed: A process ended, or the ways do not fit beside each other.
    """
    options = [f"--preset={args.preset}", f"--batch={args.batch}", f"--threads={args.threads}"]
    options += [f"--device={args.device}", *(["--hand-back"] if args.hand_back else [])]
    options += [f"--image-size={args.image_size}"] if args.image_size else []
    workers = {
        way: subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *options, "--work", way],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for way in args.ways
    }
    try:
        _require_memory({way: _answer(way, worker) for way, worker in workers.items()}, args)
        answers: dict[str, list[dict[str, float]]] = {way: [] for way in workers}
        for number in range(args.warmup + args.rounds):
            for way, worker in workers.items():
                assert worker.stdin is not None
                worker.stdin.write("step\n")
                worker.stdin.flush()
                answer = _answer(way, worker)
                print(f"{args.preset}:{args.batch} round {number} {way} {answer['s']:.2f} s", file=sys.stderr)
                if number >= args.warmup:
                    answers[way].append(answer)
        # One after the other: counting takes as much memory as a step.
        counts = {way: json.loads(worker.communicate()[0].splitlines()[-1]) for way, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
    return {way: [answer | counts[way] for answer in items] for way, items in answers.items()}


def _answer(way: str, worker: subprocess.Popen[str]) -> dict[str, float]:
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):
            answer: dict[str, float] = json.loads(line)
            return answer
    raise SettingFailed(f"the process of '{way}' ended with code {worker.wait()}")


def _require_memory(needed: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    import psutil

    if args.device != "cpu":
        return
    kept = sum(item["kept"] for item in needed.values())
    steps = [item["step"] for item in needed.values()]
    total_mb, available_mb = (
        kept + (max(steps) if args.hand_back else sum(steps)),
        psutil.virtual_memory().available / 1e6,
    )
    if total_mb > available_mb:
        told = ", ".join(f"{way} {item['kept']:.0f} + {item['step']:.0f}" for way, item in needed.items())
        raise SettingFailed(
            f"{args.preset}:{args.batch} needs about {total_mb:.0f} MB and {available_mb:.0f} are free (MB held + in a "
            f"step: {told}); choose a smaller batch, fewer --ways, or --hand-back"
        )


COLUMNS = (
    "preset", "batch", "way", "passes", "GFLOP/step", "s/step", "slices/s by step", "slices/s by pass",
    "ours: × by step", "ours: × by pass", "process MB", "tensors MB", "ours: share of process",
    "ours: share of tensors",
)  # fmt: skip


def rows(answers: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> list[str]:
    """Render one setting as markdown; ratios say how many times as fast ours is, and what share of memory it takes."""
    ours, lines = answers["ours"], []
    our_process, our_tensors = max(item["process_mb"] for item in ours), ours[0]["tensors_mb"]
    for way, items in answers.items():
        seconds = statistics.median(item["s"] for item in items)
        passes = int(items[0]["passes"])
        faster = statistics.median(its["s"] / own["s"] for its, own in zip(items, ours, strict=True))
        by_pass = faster * ours[0]["passes"] / passes
        process, tensors = max(item["process_mb"] for item in items), items[0]["tensors_mb"]
        lines.append(
            f"| {args.preset} | {args.batch} | {way} | {passes} | {items[0]['gflop']:.1f} | {seconds:.2f} "
            f"| {args.batch / seconds:.2f} | {args.batch * passes / seconds:.2f} | {faster:.2f} | {by_pass:.2f} "
            f"| {process:.0f} | {tensors:.0f} | {our_process / process:.2f} | {our_tensors / tensors:.2f} |"
        )
    return lines


def heading(args: argparse.Namespace) -> list[str]:
    """Say under what conditions the steps were taken."""
    import torch

    from glioma_nas.latency_devices import cpu_name

    device = cpu_name() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    handed = ", memory handed back after every step" if args.hand_back else ""
    return [
        f"{device}, {args.threads} thread(s), torch {torch.__version__}; medians of {args.rounds} alternating rounds "
        f"after {args.warmup} warm-up{handed}",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|---:|---|" + "---:|" * (len(COLUMNS) - 3),
    ]


def main() -> int:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", help="PRESET:BATCH of each setting [default: --preset and --batch]")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--image-size", type=int, default=None, help="side of the slices; the preset's by default")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="*", default=list(DEFAULT_WAYS), choices=WAYS, help="ours is always among them")
    parser.add_argument("--hand-back", action="store_true", help="return memory to the system after every step")
    parser.add_argument("--work", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args)
        return 0
    args.ways = list(dict.fromkeys(["ours", *args.ways]))
    settings = []
    for setting in args.settings or [f"{args.preset}:{args.batch}"]:
        preset, _, batch = setting.partition(":")
        if not batch.isdigit() or int(batch) < 1:
            parser.error(f"setting '{setting}': expected PRESET:BATCH, such as small:8")
        settings.append(argparse.Namespace(**{**vars(args), "preset": preset, "batch": int(batch)}))
    print("\n".join(heading(args)), flush=True)
    left_out = []
    for setting in settings:
        try:
            print("\n".join(rows(measure(setting), setting)), flush=True)
        except SettingFailed as err:
            left_out.append(str(err))
    print("".join(f"\nLeft out: {reason}." for reason in left_out), end="\n" if left_out else "")
    return 1 if left_out else 0


if __name__ == "__main__":
    raise SystemExit(main())
