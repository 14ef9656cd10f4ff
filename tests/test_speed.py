"""Promises about the speed of updates: static shapes, no recompilation, one CUDA graph, the same numbers everywhere."""

import contextlib
import copy
import functools
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.running import SCRIPTS, load, small, small_args, train

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=SCRIPTS)
def script(request):
    return load(request.param)


def make_learner(script, device=CPU, **changes):
    torch.manual_seed(0)
    args = small_args(script)
    for name, value in changes.items():
        setattr(args, name, value)
    return script.Learner(script.Dreamer(args, 3, 3).to(device), args, device)


def make_batch(script, args, seed, device=CPU):
    rng = np.random.default_rng(seed)
    T, B = args.train_seq_len, args.batch_size
    is_first = rng.random((T, B)) < 0.1
    is_first[0] = True
    action = np.stack([script.random_actions(rng, B, 3) for _ in range(T)])
    fields = (
        rng.integers(0, 256, (T, B, 3, 64, 64), np.uint8),
        action,
        rng.normal(size=(T, B)).astype(np.float32),
        is_first,
        rng.random((T, B)) < 0.1,
    )
    return script.Batch(*(torch.from_numpy(field).to(device) for field in fields))


def test_a_few_images_are_encoded_as_many_are(script):
    """The small layers of few images are matrix products, those of many convolutions."""
    encoder = make_learner(script).agent.world_model.encoder
    images = (torch.rand(300, 3, 64, 64) - 0.5).to(memory_format=torch.channels_last)
    many = encoder(images)
    for few in (1, 4):
        torch.testing.assert_close(encoder(images[:few]), many[:few])


def test_a_prefetch_that_is_left_early_draws_no_more(script):
    """Else the thread could draw with the random state while it is saved."""

    class Slow:
        drawn = 0

        def sample(self, *_):
            time.sleep(0.2)
            self.drawn += 1

    replay = Slow()
    with ThreadPoolExecutor(1) as pool:
        for _ in script.prefetch(pool, replay, None, small_args(script), 3):
            break
        assert replay.drawn == 2, "the batch that was used, and the one begun"


def test_on_the_cpu_the_policy_acts_in_float32_whatever_the_precision(script):
    image, states = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), np.uint8), []
    for precision in ("float32", "bfloat16"):
        agent = make_learner(script, precision=precision).agent
        torch.manual_seed(0)
        _, state = agent.policy(image, agent.initial_state(2), np.ones(2, bool), mode=True)
        states.append(state)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_in_bfloat16_a_head_still_tells_large_values_apart(script):
    """bfloat16 has steps of 1 from 128 to 256."""
    agent = make_learner(script, precision="bfloat16").agent
    torch.nn.init.constant_(agent.value[-1].bias, 200)
    feat = torch.randn(256, agent.value[0].in_features)
    exact = agent.value(feat)
    with script.autocast(agent.args, CPU):
        rough = agent.value(feat)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_compiled_has_no_graph_break_and_is_never_compiled_again(script, precision):
    """With `aot_eager`, which traces forward and backward as the GPU's compiler does, without its compile time. In
    float32 the numbers are those of eager code."""
    eager, learner = (make_learner(script, precision=precision) for _ in range(2))
    rssm = learner.agent.world_model.rssm
    torch._dynamo.reset()
    how = {"dynamic": False, "backend": "aot_eager"}
    rssm.observe_span = torch.compile(rssm.observe_span, fullgraph=True, **how)
    rssm.observe = torch.compiler.disable(rssm.observe)
    for name in ("imagined_returns", "actor", "actor_loss", "critic_loss"):
        setattr(learner, name, torch.compile(getattr(learner, name), fullgraph=True, **how))
    learner.world_model_loss = torch.compile(learner.world_model_loss, **how)  # breaks at `observe`, on purpose
    for seed in range(2):
        metrics = []
        for each in (eager, learner):
            torch.manual_seed(seed)
            metrics.append(each(make_batch(script, each.args, seed)))
        if precision == "float32":
            torch.testing.assert_close(*metrics, rtol=1e-4, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            learner(make_batch(script, learner.args, seed))
    torch._dynamo.reset()


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_on_the_cpu_what_is_compiled_gives_the_numbers_of_eager_code(script, pytestconfig):
    if script.__name__ != "dreamer_v2_atari" and not pytestconfig.getoption("--slow"):
        pytest.skip("runs with --slow: three minutes of the C++ compiler for each script")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    learners = [make_learner(script, compile_cpu=on, imagine_horizon=2, train_seq_len=2) for on in (False, True)]
    metrics, acted = [], []
    for learner in learners:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0, "so far nothing is compiled"
        for seed in range(2):
            torch.manual_seed(seed)
            with torch._inductor.config.patch(fallback_random=True):  # the draws of eager code
                metrics.append(learner(make_batch(script, learner.args, seed)))
                image = np.random.default_rng(seed).integers(0, 256, (1, 3, 64, 64), np.uint8)
                state = learner.agent.initial_state(1)  # one draw, the latent's: torch 2.11 may draw two in any order
                acted.append(learner.agent.policy(image, state, np.ones(1, bool), mode=True))
    torch.testing.assert_close([metrics[:2], acted[:2]], [metrics[2:], acted[2:]], rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 3
    torch._dynamo.reset()


def test_the_graph_gets_every_batch_and_every_update_counts(script, monkeypatch):
    """A call on CUDA with stand-ins for streams and graphs: a graph whose replay runs the update on the static batch.

    Who acts meanwhile has the weights from before each update.
    """
    plain, graphed = make_learner(script), make_learner(script)

    class Graph:
        def replay(self):
            for name, value in graphed.real_update(graphed.static).items():
                graphed.metrics[name].copy_(value)

    graphed.real_update, recorded = graphed.update, []

    @contextlib.contextmanager
    def capture(graph, stream, capture_error_mode):  # a capture records and computes nothing
        graphed.update = lambda batch: recorded.append(batch) or {k: v.clone() for k, v in last.items()}
        yield
        graphed.update = graphed.real_update

    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    graphed.stream, graphed.acting = stream(), copy.deepcopy(graphed.agent).requires_grad_(False)
    for seed in range(6):
        batch = make_batch(script, plain.args, seed)
        before = copy.deepcopy(plain.agent)
        torch.manual_seed(seed)
        expected = plain(batch)
        torch.manual_seed(seed)
        last = graphed(batch)
        assert expected.keys() == last.keys()
        assert all(torch.equal(expected[name], last[name]) for name in expected), f"update {seed}"
        for now, old in zip(graphed.acting.parameters(), before.parameters(), strict=True):
            assert torch.equal(now, old)
    assert len(recorded) == 1, "captured once"


def test_on_the_cpu_an_update_does_not_ask_for_cuda(script, monkeypatch):
    """A GPU that is broken or taken does not matter to `--no-cuda`, and the memory that its context takes is spared."""
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: pytest.fail("torch.cuda.stream starts CUDA"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: pytest.fail("torch.cuda.current_stream starts CUDA"))
    learner = make_learner(script)
    learner(make_batch(script, learner.args, 0))


@pytest.mark.parametrize("actor_grad", ["dynamics", "reinforce", "both"])
def test_updates_and_policy_stay_on_their_device_and_never_wait_for_it(script, actor_grad, monkeypatch):
    """On the meta device, where a value cannot be read, nor a tensor of the CPU used but in products and copies."""
    meta = torch.device("meta")
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # does not know it
    learner = make_learner(script, meta, actor_grad=actor_grad)
    for optimizer in learner.optimizers.values():
        monkeypatch.setattr(optimizer, "step", lambda: None)  # nor does the fused Adam
    batch, state = make_batch(script, learner.args, 0, meta), learner.agent.initial_state(learner.args.batch_size)
    metrics = learner(batch)
    action, state = learner.agent.policy(batch.image[0], state, batch.is_first[0])
    assert all(value.is_meta for value in (*metrics.values(), action, *state))


def test_updates_are_started_between_the_policys_step_and_the_environments(script, tmp_path, monkeypatch):
    """So a GPU, which works through them on its own, learns while the environments step on the CPU."""
    events = []

    def watch(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: events.append(name[0]) or function(*args, **kwargs))

    watch(script.Dreamer, "policy")
    watch(script.Learner, "update")
    watch(script, "step_envs")
    train(script, tmp_path, small(script))
    assert re.fullmatch("s+(pu*s)+", "".join(events)) and events.count("u") > 5


def test_the_replay_gives_a_v1_batch_within_15_ms(tmp_path):
    script = load("dreamer_v1_continuous")
    replay = script.Replay(tmp_path, 3000, 2, 1, (3, 64, 64), 6, CPU)
    rng, no = np.random.default_rng(0), np.zeros(1, bool)
    image = rng.integers(0, 256, (1, 3, 64, 64), np.uint8)
    for _ in range(3000):
        replay.add(image, np.zeros((1, 6)), np.zeros(1), no, no, no)
    seconds = []
    for _ in range(30):
        start = time.process_time()  # others may share the core
        replay.sample(rng, 50, 50)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.015


def updates_of(learner, script, device, seeds=range(8)):
    """Updates with batches of these seeds: their metrics, and the change of each network's weights."""
    parts, metrics = (learner.agent.world_model, learner.agent.actor, learner.agent.value), []

    def weights():
        return [torch.cat([parameter.detach().flatten().cpu() for parameter in part.parameters()]) for part in parts]

    before = weights()
    for seed in seeds:
        metrics.append(learner(make_batch(script, learner.args, seed, device)))
        learner.wait()
        metrics[-1] = {name: metric.item() for name, metric in metrics[-1].items()}
    return metrics, [new - old for new, old in zip(weights(), before, strict=True)]


def assert_same_updates(updates, others, tolerance):
    for values, expected in zip(updates[0], others[0], strict=True):
        assert values == pytest.approx(expected, rel=tolerance, abs=0.01 * tolerance)
    for change, expected in zip(updates[1], others[1], strict=True):
        assert (change - expected).norm() < 0.5 * expected.norm()


def draw_the_same(monkeypatch):
    """Draws that do not depend on the device, nor on what is compiled."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.4))
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.4))


@pytest.mark.parametrize("fault", [None, "one batch", "model", "actor", "value"])
def test_on_cuda_updates_that_differ_would_be_seen(script, fault, monkeypatch):
    """Of the next test, which needs CUDA: that its tolerances pass what rounding does, and nothing else."""
    draw_the_same(monkeypatch)
    plain, other = make_learner(script), make_learner(script, precision="float32" if fault else "bfloat16")
    expected = updates_of(plain, script, CPU)
    if fault in other.optimizers:
        other.optimizers[fault].step = lambda: None
    updates = updates_of(other, script, CPU, [0] * 8 if fault == "one batch" else range(8))
    with pytest.raises(AssertionError) if fault else contextlib.nullcontext():
        assert_same_updates(updates, expected, 0.3)


@needs_cuda
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 0.05), ("bfloat16", 0.3)])
def test_on_cuda_the_compiled_graph_does_the_updates_of_eager_code(script, precision, tolerance, monkeypatch):
    draw_the_same(monkeypatch)
    device, updates = torch.device("cuda"), []
    for fast in (False, True):
        learner = make_learner(script, device, precision=precision, compile=fast, cuda_graph=fast)
        updates.append(updates_of(learner, script, device))
    assert_same_updates(updates[1], updates[0], tolerance)
    # And in the graph too a step that is not finite is skipped, and only that.
    batch, before = make_batch(script, learner.args, 8, device), copy.deepcopy(learner.agent.world_model.state_dict())
    metrics = learner(batch._replace(reward=batch.reward * torch.nan))
    learner.wait()
    assert metrics["skipped/model"] == 1 and metrics["skipped/actor"] == 0
    torch.testing.assert_close(learner.agent.world_model.state_dict(), before, rtol=0, atol=0)


@needs_cuda
def test_on_cuda_the_policys_graph_acts_as_the_policy_does(script, monkeypatch):
    """With the weights of now, not those it was captured with."""
    draw_the_same(monkeypatch)
    agent = make_learner(script, torch.device("cuda"), precision="float32").agent
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 4, 3, 64, 64), np.uint8)
    is_first = rng.random((6, 4)) < 0.3
    plain = functools.partial(agent.policy, mode=True)

    def act(policy):
        state, results = agent.initial_state(4), []
        for image, first in zip(images, is_first, strict=True):
            action, state = policy(image, state, first)
            results.append([action.cpu(), *(field.cpu() for field in state)])
        return results

    graphed, old = script.fast_policy(agent, 4, mode=True), act(plain)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.mul_(2)
    new = act(plain)
    assert max((a[-2] - b[-2]).abs().max() for a, b in zip(old, new, strict=True)) > 0.01, "the weights matter"
    torch.testing.assert_close(act(graphed), new, rtol=1e-3, atol=1e-3)


@needs_cuda
def test_on_cuda_acting_beside_an_update_changes_neither(script):
    """The policy's graph replayed while updates run: both give the numbers that they give one after the other."""
    device, results = torch.device("cuda"), []
    for beside in (False, True):
        torch.manual_seed(0)
        learner = make_learner(script, device, precision="float32", compile=False)
        policy, state = script.fast_policy(learner.acting, 4, mode=False), learner.agent.initial_state(4)
        rng, actions = np.random.default_rng(0), []
        for seed in range(8):
            metrics = learner(make_batch(script, learner.args, seed, device))
            for _ in range(5):
                if not beside:
                    torch.cuda.synchronize()
                image = rng.integers(0, 256, (4, 3, 64, 64), np.uint8)
                action, state = policy(image, state, np.zeros(4, bool))
                actions.append(action.cpu())
        learner.wait()
        weights = [parameter.flatten().cpu() for parameter in learner.agent.parameters()]
        results.append((torch.stack(actions), torch.cat(weights), metrics["losses/image"].item()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


@needs_cuda
def test_on_cuda_the_layers_that_are_products_there_are_convolutions(script):
    learner = make_learner(script, torch.device("cuda"), precision="float32")
    model = learner.agent.world_model
    for name, parameter in model.named_parameters():
        if "bias" in name:  # zeros at first
            torch.nn.init.normal_(parameter)
    image = (torch.rand(300, 3, 64, 64) - 0.5).to(memory_format=torch.channels_last)
    feat = torch.randn(300, model.decoder.linear.in_features)
    on_gpu = [model.encoder(image.cuda()).cpu(), model.decoder(feat.cuda()).cpu()]
    model.cpu()
    torch.testing.assert_close(on_gpu, [model.encoder(image), model.decoder(feat)], rtol=2e-2, atol=5e-3)


@needs_cuda
def test_on_cuda_the_latent_state_is_float32_in_bfloat16_too(script):
    device = torch.device("cuda")
    learner = make_learner(script, device, precision="bfloat16", compile=False)
    with script.autocast(learner.args, device):
        _, post, _ = script.world_model_loss(
            learner.agent.world_model, make_batch(script, learner.args, 0, device), learner.args
        )
    assert {field.dtype for field in post} == {torch.float32}


@needs_cuda
def test_on_cuda_the_replay_mirrors_its_images(script, tmp_path):
    device = torch.device("cuda")
    replay = script.Replay(tmp_path, 40, 2, 1, (3, 64, 64), 3, device)
    rng, no = np.random.default_rng(0), np.zeros(1, bool)
    for _ in range(60):
        image = rng.integers(0, 256, (1, 3, 64, 64), np.uint8)
        replay.add(image, np.zeros((1, 3)), np.zeros(1), no, no, no)
    on_gpu = replay.sample(np.random.default_rng(1), 4, 8)
    replay.mirror = None
    on_cpu = replay.sample(np.random.default_rng(1), 4, 8)
    assert torch.equal(on_gpu.image.cpu(), on_cpu.image.cpu())
