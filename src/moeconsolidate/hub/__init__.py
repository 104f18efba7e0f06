"""Models on the hub: pinned to a commit, judged by their headers, downloaded, checked.

    client     what the hub is asked, and what its refusals mean
    transfer   one file into the cache, continued where it was cut, held against its digest
    preview    a folder that has a model's headers and none of its weights
    obtain     the story: pin, look, judge, download

huggingface-hub brings the cache and its layout, the token, the endpoint and the offline switch, all
set as its users know them (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE). Weights go through
`transfer` instead of through it, because it starts a file anew in every process and checks no
digest of what came over plain HTTP.
"""
