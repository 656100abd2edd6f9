"""The command line: training commands (LightningCLI), plain commands, run folders, messages for people."""
