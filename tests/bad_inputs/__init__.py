"""Bad inputs by the hundred: what a hostile or unlucky user can give, each to be answered by one clear message.

`python -m tests.bad_inputs [FAMILY | 1/N]...` tries them all, or one in N, and prints a table; test_bad_inputs.py tries
a sample. Every case is a change of a small project and a command line. It passes when the command ends within
`SECONDS`, with exit code 1 or 2, in bounded memory, without a traceback or an "unexpected" error, and when the message
names what is wrong: the file, the key, the line or the variable.
"""
