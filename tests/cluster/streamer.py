"""A child process that drives (or goes on with) a pipeline or a map-reduce job over numbers.

``python -m tests.cluster.streamer URL CLUSTER pipeline|map NAME COUNT JSON``; it says ``begins``, then a
``result`` per item, or ``partial`` and one ``result``, and ``over`` at the end.
"""

from __future__ import annotations

import asyncio
import json
import sys

from foundation_nats import FoundationError
from foundation_nats.coordination import map_reduce, pipeline
from tests.cluster.initiator import connect


async def main(url: str, cluster_name: str, kind: str, name: str, count: str, more: str) -> None:
    """Drive it, and again where the server was away."""
    cluster = await connect(url, cluster_name)
    arguments = json.loads(more)
    print("begins", flush=True)
    while True:
        try:
            if kind == "map":
                value = await map_reduce(
                    cluster,
                    name,
                    range(int(count)),
                    on_progress=lambda p: print("partial", p.chunks, p.reissued, flush=True),
                    **arguments,
                )
                print("result", json.dumps(value), flush=True)
            else:
                stages = arguments.pop("stages")
                items = ([n] for n in range(int(count)))
                async with pipeline(cluster, name, stages, items, **arguments) as run:
                    async for found in run:
                        print("result", found.item, json.dumps(found.get()), flush=True)
            break
        except FoundationError as error:
            if not error.retryable:
                raise
            arguments = json.loads(more)
    print("over", flush=True)
    await cluster.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
