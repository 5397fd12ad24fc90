"""The codebases whose blocks are recognised, one file each."""
