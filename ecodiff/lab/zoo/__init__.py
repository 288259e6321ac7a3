"""The embedded family: recipes, training, checking and model cards of the small models under ``data/models``.

    python -m ecodiff zoo list
    python -m ecodiff zoo train openmoji-sdxl          # resumable; checkpoints under .runs/
    python -m ecodiff zoo train all --smoke            # a few steps of each, into .runs/smoke
    python -m ecodiff zoo evaluate openmoji-sdxl       # the numbers of the model card
    python -m ecodiff zoo check                        # checksums, plain loading, one fixed picture each

Set OMP_WAIT_POLICY=PASSIVE where other programs share the cores: threads that wait actively hold up the ones they wait
for. Measured on the judge, beside one busy program on two cores: 0.6 s a step with it, 4 to 8 s without.

An embedded pipeline is an ordinary diffusers folder: ``DiffusionPipeline.from_pretrained`` loads it without this
package. The judge is an ordinary folder of transformers.
"""
