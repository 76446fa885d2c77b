"""From files of text and conversations to token files: reading inputs, tokenizing, writing, merging, deduplicating.

Nothing here runs during training. Data flows one way: `inputs` reads chunks of records, `encoding` turns texts into ids,
`preprocess` and `chat` drive both and write with `data/writer.py`; `merge`, `shuffle` and `dedup` work on what exists.
Nothing is imported here: the command line must start without torch.
"""
