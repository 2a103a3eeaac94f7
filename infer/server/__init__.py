"""HTTP server over the engine: OpenAI's and Anthropic's interfaces, and a page (docs/serving.md).

app.py            routes, one table
http_layer.py     bodies in, answers and event streams out; keys, sizes, request ids, disconnects
schemas*.py       request bodies, from which validation and /openapi.json follow
served_model.py   the model as the routes see it
engine_thread.py  the engine's thread, its queue, and streams of what it gives
plan.py           a body's settings as the engine's request
reply_text.py     text that may be shown: whole characters, nothing of a stop text
chat.py ...       one file per dialect
process.py        uvicorn, signals, draining
"""
