"""Text to ids and back: bytes, byte-level BPE, SentencePiece."""
