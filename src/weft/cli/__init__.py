"""The command `weft`, one file a command. A command module has

    arguments(parser)        adds its flags to an argparse parser; imports nothing heavy, so that its --help is quick
    run(args) -> int | None  does the work; None and 0 are success

and may have `parse(words) -> args` where argparse alone will not do. `main.COMMANDS` names it in one line.
"""
