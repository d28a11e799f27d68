"""``python -m shardlab.cli``: what a local rank runs."""

from shardlab.cli.main import main

main()
