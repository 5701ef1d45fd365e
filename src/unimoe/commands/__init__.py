"""The subcommands of `unimoe`; each module adds its parser and runs it."""
