"""The fixed vocabularies that tasks draw names and values from.

Keys are ``adjective-noun`` pairs (4,096 of them). Value words are disjoint from both lists and are
common enough to be one token, with their leading space, in the tokenizers of most models.
"""

_ADJECTIVES_TEXT = """
agile amber ample ancient arctic azure blunt bold brisk bronze calm clever cobalt coral cosmic
crimson curly daring dusty eager early elegant fabled fair fleet fluffy frosty gentle gilded
glossy golden grand hasty hidden humble icy indigo ivory jolly keen lively lunar mellow misty
modest nimble noble pale polar proud quiet rapid rustic sandy scarlet silent silver solar sturdy
sunny swift vivid wild witty
"""
ADJECTIVES = tuple(_ADJECTIVES_TEXT.split())

_NOUNS_TEXT = """
acorn anchor badger barrel beacon beaver bison canyon castle cedar cobra comet condor cougar
coyote crane dolphin dragon falcon fjord forest gecko geyser glacier grove harbor hawk heron
island jackal jaguar lagoon lantern lizard lynx magnet mammoth maple marlin meadow meteor
moose orchid osprey otter panther parrot pebble pelican pigeon planet puffin quartz rabbit
raven reef salmon spruce temple thistle tiger tulip turtle walrus
"""
NOUNS = tuple(_NOUNS_TEXT.split())

_VALUE_WORDS_TEXT = """
apple army artist autumn baby bank beach bell bird blood board boat bone book bottle box bread
bridge brother butter camera captain car card cat chair cheese chicken church circle city clock
coffee copper corn cotton cow cup dance desert doctor dog door dream dress drum engine eye
family farm father finger fire fish flag floor flower fruit garden gate ghost girl glass gold
grass guitar hair hammer hand hat heart hill honey horse hospital hotel ice iron jacket judge
king kitchen knife lake leather lemon letter lion machine market meat milk mirror money moon
mother mountain mouse music night ocean oil onion orange paint paper pepper piano picture pilot
plane plant pocket poet prince queen rain ring river road
"""
VALUE_WORDS = tuple(_VALUE_WORDS_TEXT.split())
