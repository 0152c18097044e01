import os

if os.environ.get("TRITON_INTERPRET") == "1":
    os.environ["CTXENC_VERIFY"] = (
        "0"  # a proof of every kind that is drawn takes minutes; test_verdicts.py asks for them
    )
else:
    collect_ignore_glob = ["test_*.py"]
