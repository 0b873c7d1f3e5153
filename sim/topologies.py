"""Networks that studies are made on: who is linked to whom, and the same in words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import networkx

from sim.flows import Link
from sim.network import listed


def star(owners: Sequence[str], workers: Sequence[str], access: Link, site: Link) -> networkx.Graph:
    """Every owner behind an `access` link of its own, every worker behind a `site` link of its own,
    and between them an "internet" that is never the bottleneck."""
    _check_names([*owners, *workers], ["internet"])
    graph = networkx.Graph()
    for names, link in ((owners, access), (workers, site)):
        for name in names:
            graph.add_edge(name, "internet", link=link)
    return graph


def two_sites(
    owners: Sequence[str],
    workers_a: Sequence[str],
    workers_b: Sequence[str],
    *,
    access: Link,
    uplink_a: Link,
    uplink_b: Link,
    lan: Link,
) -> networkx.Graph:
    """Workers at two sites. All workers of a site share its uplink to the "internet".

    owner - access - "internet" - uplink - "site A" or "site B" - lan - worker
    """
    _check_names([*owners, *workers_a, *workers_b], ["internet", "site A", "site B"])
    graph = networkx.Graph()
    for name in owners:
        graph.add_edge(name, "internet", link=access)
    for site, uplink, workers in (
        ("site A", uplink_a, workers_a),
        ("site B", uplink_b, workers_b),
    ):
        graph.add_edge(site, "internet", link=uplink)
        for name in workers:
            graph.add_edge(name, site, link=lan)
    return graph


def describe(graph: networkx.Graph) -> str:
    """The network in words, one line for all equal links of a hub."""
    groups: dict[tuple[str, Link], list[str]] = {}
    for a, b, link in graph.edges(data="link"):
        leaf, hub = (b, a) if graph.degree[a] > graph.degree[b] else (a, b)
        groups.setdefault((hub, link), []).append(leaf)
    return "\n".join(
        f"{listed(leaves)} - {hub}: {_in_words(link)}{', each' if len(leaves) > 1 else ''}"
        for (hub, link), leaves in groups.items()
    )


def _in_words(link: Link) -> str:
    unit = next((u for u in ((1e9, "Gb/s"), (1e6, "Mb/s")) if link.bandwidth_bps >= u[0]), None)
    size, name = unit or (1e3, "kb/s")
    words = [f"{link.bandwidth_bps / size:g} {name}", f"{link.delay_s * 1e3:g} ms one way"]
    if link.jitter_s:
        words.append(f"jitter {link.jitter_s * 1e3:g} ms")
    if link.loss:
        words.append(f"loss {link.loss:.3g}")
    return ", ".join(words)


def _check_names(names: Sequence[str], taken: Sequence[str]) -> None:
    """Host names are different from each other and from the names of the network's own nodes."""
    everyone = [*names, *taken]
    if len(set(everyone)) < len(everyone):
        twice = next(a for a, b in combinations(sorted(everyone), 2) if a == b)
        raise ValueError(f"two hosts are called {twice!r}; give each a name of its own")
