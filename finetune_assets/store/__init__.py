"""Published artifacts: their manifests, digests and folders.

The room does not know what an artifact means. Front door: `artifact_store`.
"""
