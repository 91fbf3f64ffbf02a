"""All chains at once behind one semaphore, the pattern of llm-swarm's Constitutional AI example.

Every record is a task from the start; its requests pass a semaphore one by one, in the order in which they come to it,
so that every draft is asked for before the first critique. Nothing is stored before all is done.
"""

from __future__ import annotations

import asyncio
import time

import aiohttp
from chain import TURNS, Row, max_tokens_of, parser, prompt_maker, read_rows, report


async def run(rows: list[Row], url: str, model: str, style: str, max_tokens: int, limit: int) -> None:
    prompt, semaphore = prompt_maker(style), asyncio.Semaphore(limit)

    async def ask(row: Row, turn: str) -> None:
        asked = prompt(row, turn)
        body = {"model": model, "max_tokens": max_tokens_of(turn, max_tokens), "temperature": 1.0}
        is_text = isinstance(asked, str)
        body |= {"prompt": asked} if is_text else {"messages": asked}
        async with (
            semaphore,
            session.post(url + ("/completions" if is_text else "/chat/completions"), json=body) as got,
        ):
            got.raise_for_status()
            choice = (await got.json())["choices"][0]
        row[turn] = (choice["text"] if is_text else choice["message"]["content"]).strip()

    async def chain(row: Row) -> None:
        for turn in TURNS[:3]:
            await ask(row, turn)
        await asyncio.gather(*(ask(row, turn) for turn in TURNS[3:]))

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(chain(row) for row in rows))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--limit", type=int, default=500, help="requests in flight")
    given = options.parse_args()
    rows = read_rows(given.prompts)
    began = time.perf_counter()
    asyncio.run(run(rows, given.base_url, given.model, given.style, given.max_tokens, given.limit))
    report(rows, time.perf_counter() - began)


if __name__ == "__main__":
    main()
