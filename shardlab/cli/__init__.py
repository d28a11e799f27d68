"""The ``shardlab`` command: one file per subcommand, torch imported only where it is needed."""
