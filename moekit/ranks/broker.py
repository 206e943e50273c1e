"""A process beside the driver that speaks with Ray: it places the actors, and tells what becomes of them.

Ray ends a process of its own whose node or head is lost. This process may end so; the driver, often a notebook's kernel, must
not, and imports no Ray. It asks over a pipe; what Ray knows and what the nodes say of one another comes back on it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import cloudpickle

from moekit.headlines import first_line, folded, headline
from moekit.processes import channel, system
from moekit.ranks import links, supervisor

# Seconds between two looks at the links between nodes, for one connection, and between two looks at the head.
EACH, CONNECT, HEAD = 3.0, 2.5, 2.0

# Seconds for what a node has seen to come here.
ANSWER = 1.0

# What is lost has not answered so many times in a row.
TIMES = 3

# Seconds for Ray's head to take a connection.
HEAD_LIMIT = 10.0

# Seconds for the actors to start once they have a place.
ACTORS_LIMIT = 60.0

# Seconds for the actors to end their ranks.
END_LIMIT = 3.0


class Refused(Exception):
    """What was asked for cannot be; the message says why."""


def main() -> None:
    """Answer the driver until its pipe closes."""
    pipe = channel.from_standard_input()
    broker = Broker(pipe)
    incoming = channel.Incoming(pipe)
    code = 0
    try:
        while True:
            if channel.readable(pipe, 0.05) and (message := incoming.read()) is not None:
                name, arguments = cloudpickle.loads(message)
                if name == "end":
                    break
                try:
                    broker.say(name, getattr(broker, name)(**arguments))
                except Refused as error:
                    broker.say("refused", str(error))
                except Exception as error:
                    broker.say("refused", headline(error))
            broker.listen()
    except (EOFError, OSError):
        # The driver is gone.
        pass
    except BaseException:
        code = 1
        raise
    finally:
        broker.end()
        os._exit(code)


def bundles_of(world_size: int, per_node: int | None, spread: bool) -> tuple[list[int], str]:
    """How many ranks each bundle of the placement group has, and Ray's name of the strategy."""
    if spread:
        return [1] * world_size, "STRICT_SPREAD"
    if per_node is None:
        return [1] * world_size, "PACK"
    full, rest = divmod(world_size, per_node)
    return [per_node] * full + ([rest] if rest else []), "STRICT_SPREAD"


def said(resources: dict[str, float]) -> str:
    """Resources in words, such as "2 CPU and 1 GPU"."""
    return " and ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name))


def has(nodes: list[dict[str, Any]]) -> str:
    """What the cluster has, in words."""
    each = (f"{node['NodeManagerAddress']} with {said(node['Resources']) or 'nothing'}" for node in nodes)
    return f"it has {len(nodes)} node{'s' * (len(nodes) != 1)}: {', '.join(each)}"


class Broker:
    """What the driver may ask for: ``join``, ``place``, ``separate``, ``start`` and ``look``."""

    def __init__(self, pipe: socket.socket):
        self._pipe = pipe
        self._actors: list[Any] = []
        self._places: list[dict[str, Any]] = []
        self._group: Any = None
        # What is asked of actors and not answered yet, by its reference: how to ask again, and who takes the answer.
        self._asked: dict[Any, tuple[Callable[[], Any] | None, Callable[[Any, str | None], None]]] = {}
        # What is to be asked again, and when.
        self._later: list[tuple[float, Callable[[], Any], Callable[[Any, str | None], None]]] = []
        self._saying = threading.Lock()

    def say(self, kind: str, content: Any) -> None:
        with self._saying:
            channel.send(self._pipe, cloudpickle.dumps((kind, content)))

    # ------------------------------------------------------------------------------------------------ placing

    def join(self, address: str) -> None:
        """Join the cluster; Refused if none answers."""
        import ray

        known = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
        if "://" in known:
            raise Refused(
                f"address={known!r} is an address of Ray's client: the driver runs on a machine of the cluster, since ranks "
                "connect to it; start the notebook there, with the head's host:port"
            )
        host, _, port = known.rpartition(":")
        # Ray itself waits for minutes.
        why = (
            links.reach([(host.strip("[]"), int(port))], HEAD_LIMIT)[0] if host and port.isdecimal() else None
        )
        if why is None:
            try:
                ray.init(
                    address=address,
                    log_to_driver=False,
                    configure_logging=False,
                    namespace=f"moekit-{os.getpid()}",
                )
                return
            except (ConnectionError, RuntimeError, ValueError) as error:
                why = first_line(error, 300)
        at = f"address={address!r}" + (f", which is {known}" if known not in ("", address) else "")
        raise Refused(
            f"no Ray cluster answers at {at} ({why}): start one with `ray start --head`, or give RayRanks(address=...) its "
            "head's"
        )

    def place(
        self,
        world_size: int | None,
        device: str,
        per_node: int | None,
        cores: int,
        spread: bool,
        interface: str | None,
        wait: float,
    ) -> dict[str, Any]:
        """Place an actor for each rank.

        Returns:
            ``device``; ``here``, this machine's address for the nodes; ``places``, what :meth:`Supervisor.about` says of
            each rank's node, those of one node next to each other.

        Raises:
            Refused: the cluster does not have the place that is asked for.
        """
        import ray

        for module in (supervisor, links, system):
            # Nodes get this code with the actor, so that it is the driver's version.
            ray.cloudpickle.register_pickle_by_value(module)
        nodes = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda node: node["NodeManagerAddress"])
        if device == "auto":
            device = "cuda" if any(node["Resources"].get("GPU") for node in nodes) else "cpu"
        if world_size is None:
            most = per_node or (10**6 if device == "cuda" else 1)
            world_size = sum(
                min(most, int(node["Resources"].get("GPU", 0)) if device == "cuda" else most)
                for node in nodes
            )
            if world_size == 0:
                raise Refused(f"no node of the cluster has a GPU: use device='cpu'; {has(nodes)}")
        each = {"CPU": cores} | ({"GPU": 1} if device == "cuda" else {})
        bundles, strategy = bundles_of(world_size, per_node, spread)
        self._group = ray.util.placement_group(
            [{name: count * own for name, own in each.items()} for count in bundles], strategy=strategy
        )
        try:
            ray.get(self._group.ready(), timeout=wait)
        except ray.exceptions.GetTimeoutError:
            free = ray.available_resources()
            raise Refused(
                f"the cluster has no place for {world_size} ranks of {said(each)}"
                + (f", {per_node} on a node" if per_node else ", each on a node of its own" if spread else "")
                + f" within {wait:g} s; {has(nodes)}; free are {said(free) or 'none'}. Ask for fewer ranks, or add nodes"
            ) from None
        actor = ray.remote(supervisor.Supervisor)
        of = [number for number, count in enumerate(bundles) for _ in range(count)]
        self._actors = [
            actor.options(
                num_cpus=cores,
                num_gpus=each.get("GPU", 0),
                max_concurrency=8,
                max_restarts=0,
                scheduling_strategy=ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=number
                ),
            ).remote()
            for number in of
        ]
        found = self._get([one.about.remote(interface) for one in self._actors])
        # Ranks of one node are next to each other, in the order of its GPUs.
        nodes = list(dict.fromkeys(place["id"] for place in found))
        order = sorted(
            range(world_size),
            key=lambda rank: (
                nodes.index(found[rank]["id"]),
                [(len(gpu), gpu) for gpu in found[rank]["gpus"]],
            ),
        )
        self._actors, self._places = [self._actors[rank] for rank in order], [found[rank] for rank in order]
        head = ray.get_runtime_context().gcs_address
        threading.Thread(target=self._watch_head, args=(head,), daemon=True).start()
        threading.Thread(target=self._watch_links, daemon=True).start()
        return {"device": device, "here": ray.util.get_node_ip_address(), "places": self._places}

    def _ways(self) -> tuple[list[int], list[tuple[str, int]]]:
        """The first rank of each node, and where others reach this node."""
        first = {}
        for rank, place in enumerate(self._places):
            first.setdefault(place["id"], rank)
        ranks = list(first.values())
        return ranks, [(self._places[rank]["address"], self._places[rank]["port"]) for rank in ranks]

    def separate(self) -> list[tuple[int, int, str]]:
        """Of nodes that cannot reach others, by their first ranks: from which, to which, and why not."""
        ranks, addresses = self._ways()
        found = self._get([self._actors[rank].reach.remote(addresses, CONNECT) for rank in ranks])
        pairs = zip(ranks, found, strict=True)
        return [(start, to, why) for start, row in pairs for to, why in zip(ranks, row, strict=True) if why]

    def _get(self, references: list[Any]) -> list[Any]:
        import ray

        try:
            return ray.get(references, timeout=ACTORS_LIMIT)
        except ray.exceptions.GetTimeoutError:
            raise Refused(
                f"Ray's actors do not start within {ACTORS_LIMIT:g} s: see `ray status` and Ray's logs"
            ) from None
        except ray.exceptions.RayError as error:
            raise Refused(f"an actor does not start: {str(error).strip()[-1000:]}") from error

    # ------------------------------------------------------------------------------------------------ ranks

    def start(self, orders: list[dict[str, Any]]) -> None:
        """Have every actor start its rank; "started" or "lost" comes for each."""
        for rank, (actor, order) in enumerate(zip(self._actors, orders, strict=True)):
            start = functools.partial(actor.start.remote, order)
            self._ask(start, lambda pid, why, rank=rank: self._started(rank, pid, why), again=False)

    def _started(self, rank: int, pid: int | None, why: str | None) -> None:
        if why is not None:
            self.say("lost", (rank, why))
            return
        self.say("started", (rank, pid))
        self._follow(rank, False)

    def _follow(self, rank: int, stopped: bool) -> None:
        """Tell when the rank's process is stopped or goes on, and when it has ended; ``stopped`` is what it is now."""

        def then(news: tuple[Any, ...], why: str | None) -> None:
            kind, *content = news if why is None else ("lost", why)
            self.say(kind, (rank, *content))
            if kind == "stopped":
                self._follow(rank, *content)

        self._ask(functools.partial(self._actors[rank].news.remote, stopped), then)

    def look(self, rank: int) -> None:
        """Ask for the state of a rank's process; "looked" comes when its actor answers."""
        self._ask(
            self._actors[rank].look.remote,
            lambda seen, why: why is None and self.say("looked", (rank, seen)),
        )

    def _ask(
        self, call: Callable[[], Any], then: Callable[[Any, str | None], None], again: bool = True
    ) -> None:
        """Have ``then`` take the answer or why there is none; ``again`` asks once more where the message was lost."""
        self._asked[call()] = (call if again else None, then)

    def listen(self) -> None:
        """Pass on the answers that have come."""
        import ray

        due = [entry for entry in self._later if entry[0] <= time.monotonic()]
        for entry in due:
            self._later.remove(entry)
            self._ask(*entry[1:])
        if not self._asked:
            return
        ready, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0.02)
        for reference in ready:
            call, then = self._asked.pop(reference)
            try:
                answer, why = ray.get(reference), None
            except ray.exceptions.ActorUnavailableError as error:
                if call is not None:
                    # A connection of Ray's was reset; whether the node is lost, others tell.
                    self._later.append((time.monotonic() + 1.0, call, then))
                    continue
                answer, why = None, folded(error, 600)
            except ray.exceptions.RayTaskError as error:
                answer, why = None, str(error.cause)[:1000]
            except ray.exceptions.RayError as error:
                answer, why = None, folded(error, 600)
            then(answer, why)

    # ------------------------------------------------------------------------------------------------ watching

    def _watch_head(self, address: str) -> None:
        """Tell when Ray's head takes no connection any more."""
        host, _, port = address.rpartition(":")
        failed = 0
        while True:
            why = links.reach([(host.strip("[]"), int(port))], CONNECT)[0]
            failed = 0 if why is None else failed + 1
            if failed == TIMES:
                self.say("fault", (None, f"Ray's head at {address} does not answer ({why})"))
            time.sleep(HEAD)

    def _watch_links(self) -> None:
        """Tell when a node cannot be reached from this machine, or from another node."""
        import ray

        ranks, addresses = self._ways()
        # A driver without the network of the ranks is no fault: it has connections of its own to them.
        seen = [why is None for why in links.reach(addresses, CONNECT)]
        failed: dict[tuple[int | None, int], int] = {}
        while True:
            began = time.monotonic()
            broken = {}
            # All look at the same time. Who could not be reached from here a moment ago would not answer.
            asked = {}
            with contextlib.suppress(ray.exceptions.RayError):
                asked = {
                    self._actors[rank].reach.remote(addresses, CONNECT): rank
                    for rank in ranks
                    if (None, rank) not in failed and len(ranks) > 1
                }
            here = links.reach(addresses, CONNECT)
            for to, why, once in zip(ranks, here, seen, strict=True):
                if why is not None and once:
                    broken[None, to] = why
            left = max(0.0, began + CONNECT + ANSWER - time.monotonic())
            ready = ray.wait(list(asked), num_returns=len(asked), timeout=left)[0] if asked else []
            for reference in ready:
                with contextlib.suppress(ray.exceptions.RayError):
                    for to, why in zip(ranks, ray.get(reference), strict=True):
                        if why is not None:
                            broken[asked[reference], to] = why
            failed = {pair: failed.get(pair, 0) + 1 for pair in broken}
            for (start, to), times in failed.items():
                if times == TIMES:
                    before = (
                        "the driver's machine" if start is None else f"node {self._places[start]['address']}"
                    )
                    over = self._places[to]["interface"]
                    self.say(
                        "fault", (to, f"cannot be reached from {before} over {over} ({broken[start, to]})")
                    )
            time.sleep(max(0.0, EACH - (time.monotonic() - began)))

    def end(self) -> None:
        """End the ranks and their actors."""
        import ray

        if not ray.is_initialized():
            return
        # Where the head is lost Ray may wait without end, and the actors end by themselves.
        threading.Timer(2 * END_LIMIT, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        with contextlib.suppress(Exception):
            ray.wait(
                [actor.end.remote() for actor in self._actors],
                num_returns=max(1, len(self._actors)),
                timeout=END_LIMIT,
            )
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        with contextlib.suppress(Exception):
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
            ray.shutdown()
