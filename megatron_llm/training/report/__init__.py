"""`megatron-llm report`: run folders become one self-contained page. Called by `cli/report.py`; imports no torch.

`read.py` reads run folders, `curves.py` makes of a million steps what a screen can show, `charts.py` draws it, `facts.py` says
the rest in words and numbers, `page.py` puts all into `templates/`.
"""
