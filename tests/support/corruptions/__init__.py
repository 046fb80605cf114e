"""What can be wrong with a model on its way into Ollama: each harm, the place it strikes, the check that finds it.

One list for the tests, which strike tiny models, and for docs/battery.py, which strikes a finished project's.
"""
