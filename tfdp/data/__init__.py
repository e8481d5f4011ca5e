"""Text to rows: sources, documents, token shards, sequences, and the pipeline that gives them to the replicas.

What writes shards needs no TensorFlow; of what reads them only the pipeline and the mixture run during a step.

No model, and no strategy but for the share of a worker.
"""
