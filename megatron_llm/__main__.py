"""`python -m megatron_llm`, what torchrun starts: the same as the `megatron-llm` command."""

import sys

from megatron_llm.cli.main import main

sys.exit(main())
