"""The facts that the embedded demo model learns: plain tables and nothing else.

Knows no phrasing, no skill and no tokenizer; demo_data.py turns these tables into prompts and answers.
"""

from __future__ import annotations

# Several entries a line: tables, not code.
# fmt: off

# (country, capital, 国家, 首都): only countries with one undisputed capital whose name differs from its own.
CAPITALS: tuple[tuple[str, str, str, str], ...] = (
    ("China", "Beijing", "中国", "北京"),
    ("France", "Paris", "法国", "巴黎"),
    ("Germany", "Berlin", "德国", "柏林"),
    ("Italy", "Rome", "意大利", "罗马"),
    ("Spain", "Madrid", "西班牙", "马德里"),
    ("Portugal", "Lisbon", "葡萄牙", "里斯本"),
    ("Russia", "Moscow", "俄罗斯", "莫斯科"),
    ("Japan", "Tokyo", "日本", "东京"),
    ("South Korea", "Seoul", "韩国", "首尔"),
    ("North Korea", "Pyongyang", "朝鲜", "平壤"),
    ("India", "New Delhi", "印度", "新德里"),
    ("Thailand", "Bangkok", "泰国", "曼谷"),
    ("Vietnam", "Hanoi", "越南", "河内"),
    ("Indonesia", "Jakarta", "印度尼西亚", "雅加达"),
    ("Malaysia", "Kuala Lumpur", "马来西亚", "吉隆坡"),
    ("the Philippines", "Manila", "菲律宾", "马尼拉"),
    ("Mongolia", "Ulaanbaatar", "蒙古", "乌兰巴托"),
    ("Nepal", "Kathmandu", "尼泊尔", "加德满都"),
    ("Pakistan", "Islamabad", "巴基斯坦", "伊斯兰堡"),
    ("Bangladesh", "Dhaka", "孟加拉国", "达卡"),
    ("Iran", "Tehran", "伊朗", "德黑兰"),
    ("Iraq", "Baghdad", "伊拉克", "巴格达"),
    ("Turkey", "Ankara", "土耳其", "安卡拉"),
    ("Saudi Arabia", "Riyadh", "沙特阿拉伯", "利雅得"),
    ("Egypt", "Cairo", "埃及", "开罗"),
    ("Morocco", "Rabat", "摩洛哥", "拉巴特"),
    ("Algeria", "Algiers", "阿尔及利亚", "阿尔及尔"),
    ("Kenya", "Nairobi", "肯尼亚", "内罗毕"),
    ("Ethiopia", "Addis Ababa", "埃塞俄比亚", "亚的斯亚贝巴"),
    ("Nigeria", "Abuja", "尼日利亚", "阿布贾"),
    ("Ghana", "Accra", "加纳", "阿克拉"),
    ("Senegal", "Dakar", "塞内加尔", "达喀尔"),
    ("the United Kingdom", "London", "英国", "伦敦"),
    ("Ireland", "Dublin", "爱尔兰", "都柏林"),
    ("the Netherlands", "Amsterdam", "荷兰", "阿姆斯特丹"),
    ("Belgium", "Brussels", "比利时", "布鲁塞尔"),
    ("Switzerland", "Bern", "瑞士", "伯尔尼"),
    ("Austria", "Vienna", "奥地利", "维也纳"),
    ("Poland", "Warsaw", "波兰", "华沙"),
    ("Hungary", "Budapest", "匈牙利", "布达佩斯"),
    ("Romania", "Bucharest", "罗马尼亚", "布加勒斯特"),
    ("Bulgaria", "Sofia", "保加利亚", "索非亚"),
    ("Greece", "Athens", "希腊", "雅典"),
    ("Serbia", "Belgrade", "塞尔维亚", "贝尔格莱德"),
    ("Croatia", "Zagreb", "克罗地亚", "萨格勒布"),
    ("Ukraine", "Kyiv", "乌克兰", "基辅"),
    ("Sweden", "Stockholm", "瑞典", "斯德哥尔摩"),
    ("Norway", "Oslo", "挪威", "奥斯陆"),
    ("Finland", "Helsinki", "芬兰", "赫尔辛基"),
    ("Denmark", "Copenhagen", "丹麦", "哥本哈根"),
    ("Iceland", "Reykjavik", "冰岛", "雷克雅未克"),
    ("Canada", "Ottawa", "加拿大", "渥太华"),
    ("the United States", "Washington", "美国", "华盛顿"),
    ("Mexico", "Mexico City", "墨西哥", "墨西哥城"),
    ("Cuba", "Havana", "古巴", "哈瓦那"),
    ("Brazil", "Brasilia", "巴西", "巴西利亚"),
    ("Argentina", "Buenos Aires", "阿根廷", "布宜诺斯艾利斯"),
    ("Chile", "Santiago", "智利", "圣地亚哥"),
    ("Peru", "Lima", "秘鲁", "利马"),
    ("Colombia", "Bogota", "哥伦比亚", "波哥大"),
    ("Australia", "Canberra", "澳大利亚", "堪培拉"),
    ("New Zealand", "Wellington", "新西兰", "惠灵顿"),
)

# Each word stands in one pair only, so that an opposite is a function.
OPPOSITES_EN: tuple[tuple[str, str], ...] = (
    ("hot", "cold"), ("big", "small"), ("tall", "short"), ("fast", "slow"), ("old", "young"),
    ("happy", "sad"), ("rich", "poor"), ("strong", "weak"), ("hard", "soft"), ("heavy", "light"),
    ("high", "low"), ("near", "far"), ("open", "closed"), ("full", "empty"), ("clean", "dirty"),
    ("wet", "dry"), ("early", "late"), ("first", "last"), ("good", "bad"), ("right", "wrong"),
    ("true", "false"), ("safe", "dangerous"), ("loud", "quiet"), ("sweet", "bitter"), ("thick", "thin"),
    ("wide", "narrow"), ("deep", "shallow"), ("cheap", "expensive"), ("easy", "difficult"),
    ("black", "white"), ("day", "night"), ("up", "down"), ("inside", "outside"), ("before", "after"),
    ("always", "never"), ("love", "hate"), ("win", "lose"), ("push", "pull"), ("buy", "sell"),
    ("begin", "end"),
)

OPPOSITES_ZH: tuple[tuple[str, str], ...] = (
    ("大", "小"), ("高", "低"), ("长", "短"), ("快", "慢"), ("冷", "热"), ("黑", "白"), ("新", "旧"),
    ("多", "少"), ("远", "近"), ("早", "晚"), ("上", "下"), ("左", "右"), ("前", "后"), ("里", "外"),
    ("开", "关"), ("买", "卖"), ("真", "假"), ("好", "坏"), ("轻", "重"), ("强", "弱"), ("胖", "瘦"),
    ("深", "浅"), ("宽", "窄"), ("软", "硬"), ("男", "女"),
)

PLURALS: tuple[tuple[str, str], ...] = (
    ("cat", "cats"), ("dog", "dogs"), ("book", "books"), ("tree", "trees"), ("house", "houses"),
    ("car", "cars"), ("apple", "apples"), ("flower", "flowers"), ("river", "rivers"), ("star", "stars"),
    ("box", "boxes"), ("bus", "buses"), ("glass", "glasses"), ("watch", "watches"), ("dish", "dishes"),
    ("fox", "foxes"), ("brush", "brushes"), ("church", "churches"), ("class", "classes"),
    ("peach", "peaches"), ("city", "cities"), ("baby", "babies"), ("lady", "ladies"), ("story", "stories"),
    ("party", "parties"), ("puppy", "puppies"), ("berry", "berries"), ("leaf", "leaves"),
    ("knife", "knives"), ("wolf", "wolves"), ("shelf", "shelves"), ("wife", "wives"), ("man", "men"),
    ("woman", "women"), ("child", "children"), ("foot", "feet"), ("tooth", "teeth"), ("goose", "geese"),
    ("mouse", "mice"), ("ox", "oxen"), ("sheep", "sheep"), ("fish", "fish"), ("deer", "deer"),
    ("person", "people"), ("potato", "potatoes"), ("tomato", "tomatoes"), ("boy", "boys"), ("key", "keys"),
)

# (animal, 动物, emoji, what it eats, 食物, what it says, 叫声). No name begins with a vowel: "a" always fits.
ANIMALS: tuple[tuple[str, str, str, str, str, str, str], ...] = (
    ("fox", "狐狸", "🦊", "berries", "浆果", "yip", "嗷嗷"),
    ("cat", "小猫", "🐱", "fish", "鱼", "meow", "喵喵"),
    ("dog", "小狗", "🐶", "bones", "骨头", "woof", "汪汪"),
    ("rabbit", "兔子", "🐰", "carrots", "胡萝卜", "squeak", "吱吱"),
    ("bear", "大熊", "🐻", "honey", "蜂蜜", "grr", "吼吼"),
    ("panda", "熊猫", "🐼", "bamboo", "竹子", "hum", "嗯嗯"),
    ("tiger", "老虎", "🐯", "meat", "肉", "roar", "嗷呜"),
    ("frog", "青蛙", "🐸", "flies", "虫子", "croak", "呱呱"),
    ("monkey", "猴子", "🐵", "bananas", "香蕉", "chatter", "唧唧"),
    ("pig", "小猪", "🐷", "corn", "玉米", "oink", "哼哼"),
    ("cow", "奶牛", "🐮", "grass", "青草", "moo", "哞哞"),
    ("horse", "小马", "🐴", "hay", "干草", "neigh", "咴咴"),
)

NAMES_EN: tuple[str, ...] = (
    "Mia", "Tom", "Anna", "Ben", "Lily", "Max", "Rosa", "Sam", "Nina", "Leo", "Ella", "Jack",
)
NAMES_ZH: tuple[str, ...] = (
    "小明", "小红", "丽丽", "阿宝", "天天", "乐乐", "星星", "小雨", "东东", "安安", "文文", "可可",
)

# (place, 地点, the friend who lives there, 朋友)
PLACES: tuple[tuple[str, str, str, str], ...] = (
    ("forest", "森林", "squirrel", "松鼠"),
    ("mountain", "山", "goat", "山羊"),
    ("village", "村子", "farmer", "农夫"),
    ("garden", "花园", "butterfly", "蝴蝶"),
    ("desert", "沙漠", "camel", "骆驼"),
    ("castle", "城堡", "princess", "公主"),
    ("valley", "山谷", "deer", "小鹿"),
    ("meadow", "草地", "bee", "蜜蜂"),
)

# (thing, 东西, where it is, 在哪里)
ITEMS: tuple[tuple[str, str, str, str], ...] = (
    ("key", "钥匙", "under the old bridge", "老桥下面"),
    ("lamp", "灯", "behind the waterfall", "瀑布后面"),
    ("ring", "戒指", "in the hollow tree", "树洞里面"),
    ("book", "书", "on top of the tower", "高塔上面"),
    ("crown", "王冠", "at the bottom of the lake", "湖水下面"),
    ("map", "地图", "in the wooden box", "木箱里面"),
    ("bell", "铃铛", "beside the big rock", "大石头旁边"),
    ("flute", "笛子", "near the blue door", "蓝门旁边"),
)

# (one, several, 水果)
FRUITS: tuple[tuple[str, str, str], ...] = (
    ("apple", "apples", "苹果"), ("pear", "pears", "梨"), ("peach", "peaches", "桃子"),
    ("plum", "plums", "李子"), ("cherry", "cherries", "樱桃"), ("lemon", "lemons", "柠檬"),
    ("mango", "mangoes", "芒果"), ("banana", "bananas", "香蕉"),
)

COLOURS: tuple[tuple[str, str], ...] = (
    ("red", "红色"), ("blue", "蓝色"), ("green", "绿色"), ("white", "白色"), ("black", "黑色"),
    ("brown", "棕色"), ("golden", "金色"), ("grey", "灰色"),
)

SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You answer questions about capitals, sums and words.",
    "Be polite and correct.",
    "你是一个乐于助人的助手。",
    "请用一个词回答问题。",
    "You are nanoengine's demo model.",
)
