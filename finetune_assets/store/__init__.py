"""Published artifacts: their manifests, digests and folders.

It knows nothing of what an artifact means. Front door: `artifact_store`.
"""
