"""NeMo Gym: its own rollout collector, over its own servers, with a model that answers at once.

``gym env start`` brings up what its documentation has one start before collecting: a head server, a Ray
cluster, and a process each for its simple agent, the resources server of its first example (whose verifier
says 1.0 to everything) and the model, which is ours (``nemo_model``). All of it runs in this peer's
virtualenv, so that nothing is installed meanwhile. Collecting is ``RolloutCollectionHelper``, what
``gym eval run --no-serve`` (once ``ng_collect_rollouts``) calls; that this client has been imported already
is not held against it. Several concurrencies are tried; the fastest counts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_gym.global_config import GlobalConfigDictParserConfig, get_global_config_dict
from nemo_gym.rollout_collection import RolloutCollectionConfig, RolloutCollectionHelper
from nemo_gym.server_utils import ServerClient
from omegaconf import DictConfig

from benchmarks import measurement
from benchmarks.processes import cpu_of, descendants, environment_of, memory_in_all, name_of, peak_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from benchmarks.measurement import Sample

CONCURRENCIES = (8, 32, 128, 512)
"""Values of ``num_samples_in_parallel``."""

GROUP = 8
_EXAMPLE = "example_single_tool_call"
_AGENT = f"{_EXAMPLE}_simple_agent"
_SERVERS = {
    "model": ("policy_model", "responses_api_models/instant_model"),
    "resources": (_EXAMPLE, f"resources_servers/{_EXAMPLE}"),
    "agent": (_AGENT, "responses_api_agents/simple_agent"),
}
"""By what each is: its name in the configuration, its folder."""

_MODEL = "policy_model: {responses_api_models: {instant_model: {entrypoint: app.py}}}\n"
_NAME = "NEMO_GYM_CONFIG_PATH"
"""Environment variable by which NeMo Gym tells a server its name."""

_PROMPT = {"input": [{"role": "user", "content": "What is 6 * 7?"}]}
_PATIENCE = 240.0
_GRACE = 20.0
_GLANCE = 0.5


class Servers:
    """Everything that ``gym env start`` brings up, below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.head = {"host": "127.0.0.1", "port": free.getsockname()[1]}
        self._log = folder / "servers.log"
        self._lay_out()
        self._process = self._start()

    def _lay_out(self) -> None:
        """Put our model where servers are looked for, and this virtualenv where each would get its own."""
        for _, place in _SERVERS.values():
            (self.folder / place).mkdir(parents=True)
            (self.folder / place / ".venv").symlink_to(sys.prefix, target_is_directory=True)
        model = self.folder / _SERVERS["model"][1]
        shutil.copy(Path(__file__).with_name("nemo_model.py"), model / "app.py")
        (model / "requirements.txt").touch()  # by this they know the folder of a server
        (self.folder / "model.yaml").write_text(_MODEL)

    def _start(self) -> subprocess.Popen[bytes]:
        strangers = ("PYTHONPATH", "RAY_ADDRESS")  # our own packages, and somebody else's cluster
        variables = {name: value for name, value in os.environ.items() if name not in strangers}
        variables |= {"RAY_TMPDIR": str(self.folder), "RAY_USAGE_STATS_ENABLED": "0"}
        configs = f"resources_servers/{_EXAMPLE}/configs/{_EXAMPLE}.yaml,model.yaml"
        argv = [
            *(str(Path(sys.executable).with_name("gym")), "env", "start"),
            f"+config_paths=[{configs}]",
            "+skip_venv_if_present=true",
            f"+uv_venv_dir={self.folder}",
            f"+head_server={{host: {self.head['host']}, port: {self.head['port']}}}",
        ]
        # A signal that is ignored stays so in children; this one stops them.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with self._log.open("wb") as log:
            return subprocess.Popen(  # noqa: S603 - a command of our own making
                argv, cwd=self.folder, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait_until_up(self) -> None:
        """Return when all servers answer. Raises ``RuntimeError`` if they do not."""
        give_up = time.monotonic() + _PATIENCE
        while True:
            if self._process.poll() is not None or time.monotonic() > give_up:
                msg = f"the servers did not come up: {self._log.read_text()[-2000:]}"
                raise RuntimeError(msg)
            with contextlib.suppress(ValueError, OSError):
                client = ServerClient.load_from_global_config()
                if all(client.poll_for_status(name) == "success" for name, _ in _SERVERS.values()):
                    return
            time.sleep(_GLANCE)

    def processes(self) -> dict[str, list[int]]:
        """Return the servers' processes by what they are. A shell around a server is the head's."""
        names = {name: what for what, (name, _) in _SERVERS.items()}
        found: dict[str, list[int]] = {what: [] for what in (*_SERVERS, "head", "ray")}
        for pid in descendants(os.getpid()):
            what = names.get(environment_of(pid).get(_NAME, ""))
            of_head = pid == self._process.pid or name_of(pid) == "bash"
            found[what or ("head" if of_head else "ray")].append(pid)
        return found

    def stop(self) -> None:
        """Ask them to end; end those that do not."""
        pids = descendants(os.getpid())
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        for pid in {*pids, *descendants(os.getpid())}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def _servers() -> Iterator[Servers]:
    with tempfile.TemporaryDirectory(prefix="gq-nemo-", ignore_cleanup_errors=True) as folder:
        servers = Servers(Path(folder))
        try:
            head = DictConfig({"head_server": servers.head})
            get_global_config_dict(
                GlobalConfigDictParserConfig(
                    initial_global_config_dict=head, skip_load_from_cli=True, skip_load_from_dotenv=True
                )
            )
            servers.wait_until_up()
            yield servers
        finally:
            servers.stop()


async def _collect(folder: Path, count: int, at_once: int) -> tuple[float, float]:
    """Collect so many rollouts, in groups, and check them. Returns seconds: by the clock, of our own CPU."""
    rows, out = folder / "in.jsonl", folder / "out.jsonl"
    examples = ({"id": number, "responses_create_params": _PROMPT} for number in range(count // GROUP))
    rows.write_text("".join(json.dumps(example) + "\n" for example in examples))
    config = RolloutCollectionConfig(
        agent_name=_AGENT,
        input_jsonl_fpath=str(rows),
        output_jsonl_fpath=str(out),
        num_repeats=GROUP,
        num_samples_in_parallel=at_once,
        upload_rollouts_to_wandb=False,
        disable_aggregation=True,
    )
    own, started = time.process_time(), time.perf_counter()
    results = await RolloutCollectionHelper().run_from_config(config)
    seconds, cpu = time.perf_counter() - started, time.process_time() - own
    with out.open() as written:  # a row at a time: the memory of this process counts
        _check(count, map(json.loads, written))
    _check(count, results)
    return seconds, cpu


def _check(count: int, rollouts: Iterable[Any]) -> None:
    """Raise if they are not so many different ones, each with its reward."""
    came, right = 0, set()
    for one in rollouts:
        came += 1
        if one["reward"] == 1.0:
            right.add((one["_ng_task_index"], one["_ng_rollout_index"]))
    if came != count or len(right) != count:
        msg = f"{count} rollouts went out; {came} came back, {len(right)} of them right"
        raise RuntimeError(msg)


async def _measure(servers: Servers, tasks: int, at_once: int) -> Sample:
    """Measure at one concurrency."""
    before = {name: cpu_of(pids) for name, pids in servers.processes().items()}
    seconds, own = await _collect(servers.folder, tasks, at_once)
    processes = servers.processes() | {"client": [os.getpid()]}
    spent = {name: cpu_of(pids) - before[name] for name, pids in processes.items() if name in before}
    return {
        "rate": tasks / seconds,
        "at_once": at_once,
        "cpu": {name: 1e6 * used / tasks for name, used in (spent | {"client": own}).items()},
        "memory": {name: sum(map(peak_of, pids)) for name, pids in processes.items()},
        "in_all": memory_in_all(processes),
        "commands": {},
    }


async def _best(servers: Servers, tasks: int, warm_up: int) -> Sample:
    """Return the sample of the concurrency that was fastest, with what was found at each."""
    await _collect(servers.folder, warm_up, max(CONCURRENCIES))
    samples = [await _measure(servers, tasks, at_once) for at_once in CONCURRENCIES]
    tried = {
        str(one["at_once"]): {"rate": one["rate"], "in_all": sum(one["in_all"].values())} for one in samples
    }
    return max(samples, key=lambda one: float(one["rate"])) | {"tried": tried}


def main() -> None:
    """Bring it up, measure, take it down. All of its processes are this one's descendants."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--warm-up", type=int, default=400)
    measurement.add_arguments(parser)
    options = parser.parse_args()
    with _servers() as servers:
        sample = asyncio.run(_best(servers, options.tasks // GROUP * GROUP, options.warm_up))
    print(json.dumps(sample))


if __name__ == "__main__":
    main()
