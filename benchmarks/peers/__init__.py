"""The peers' side of the comparison; runs in their own environments (see `requirements.txt`)."""
