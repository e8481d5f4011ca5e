"""Text to rows: sources, documents, token shards, sequences, and the pipeline that hands them to the replicas.

No model, and no strategy but for the share of a worker.
"""
