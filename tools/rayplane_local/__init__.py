"""The local platform: a real Kubernetes, its images and an AWS emulator on one Debian machine.

`stages.STAGES` is the table of contents: every stage can say what it would do (`plan`) and do it (`apply`). The Ansible
action plugin `local_platform` and `python -m rayplane_local` both run stages from that table.
"""
