"""What concerns Ollama: Modelfile, model store, publication and the checks of the served model.

Front door: `publish`.
"""
