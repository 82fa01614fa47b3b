"""Floor 4: plugins for other trainers, in the form that each of them loads.

    axolotl         hf_xent.integrations.axolotl.XentPlugin, in the YAML's list of plugins
    LLaMA-Factory   hf_xent.integrations.llamafactory.run, in an entry script
    ms-swift        hf_xent.integrations.ms_swift.register, in a file of `--external_plugins`

Each is imported from its module, since it needs its trainer's packages.
"""
