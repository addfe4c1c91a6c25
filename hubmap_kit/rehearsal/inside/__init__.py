"""What runs inside the sandbox: standard library only, because the kit is not installed there.

Started as a folder, `python inside`.
"""
