"""The version of tfdp."""

VERSION = "0.1.0"
