"""From files of text and conversations to token files: reading inputs, tokenizing, writing, merging, deduplicating.

Nothing here runs during training. Data flows one way: `inputs` reads chunks of records, `encoding` turns texts into ids,
`preprocess` and `chat` say what to do, `pipeline` does it and writes with `data/writer.py`; `merge`, `shuffle` and `dedup` work
on what exists.
Nothing is imported here: the command line must start without torch.
"""
