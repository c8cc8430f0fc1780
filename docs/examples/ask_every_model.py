"""Ask every model of a server the same thing at once, and print each one's text as it comes.

python ask_every_model.py http://127.0.0.1:8000/v1 "Once upon a time"
"""

import asyncio
import sys

import openai


async def ask(client, model, prompt):
    stream = await client.completions.create(
        model=model, prompt=prompt, max_tokens=24, temperature=0, stream=True
    )
    text = ""
    async for chunk in stream:
        text += chunk.choices[0].text if chunk.choices else ""
    return model, text


async def main(url, prompt):
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        models = [model.id async for model in client.models.list()]
        # All at once: they share the machine as the server's policy says.
        for answer in asyncio.as_completed([ask(client, model, prompt) for model in models * 3]):
            model, text = await answer
            print(f"{model}: {text!r}", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
